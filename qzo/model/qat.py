"""The fake-quantized modules of ZeroQAT (arXiv 2509.00031). What is stored, and what a forward sees as a function of it.

A FakeQuantLinear has, for a weight of N rows, K columns, G = ceil(K / group_size) groups:

    weight    [N, K] fp32, bf16 or fp16: the latent W, as in the checkpoint: neither smoothed nor rounded. Moved by a target `latent`
    bias      [N] or None: B, as in the checkpoint
    low, high [N, G] fp32: logits of the clipping bounds (LWC). Moved by a target `quantizer`
    factor, move [N, G] fp32: Δ is that of the bounds times factor, z that of the bounds plus move, rounded, 0 … 2^b - 1. At first 1
              and 0. Moved by a target `quantizer`
    span      [1] fp32: the part of a token's range that its grid covers, 1 in the paper; at first the same for Linears of one input.
              None at 16 bits. Moved by a target `quantizer`
    s, δ      of the places before and after it, fp32: they belong to a Site (model/smoothing.py), which several modules share.
              Moved by a target `quantizer`
    step, zero [N, G] fp32 and offset [N]: the frozen grid (Δ, z) and the bias. `refresh()` makes them of all of the above, once per
              update, `refresh_offset()` the bias alone: a step's ± pair sees one grid, and one bias. Both write in place, so that a
              captured graph finds them again.

    S = s_in ⊙ W ⊘ s_out                            [N, K]: the smoothed weight; (Δ, z) are those of S
    y = Q_a(x) · Q(S; Δ, z)ᵀ + offset               offset = (B + W δ_in - δ_out) ⊘ s_out, with W before rounding

x is what the module before it already shifted and scaled, or, at a site without such a module, (x - δ_in) ⊘ s_in is taken here.
The step that W[n, k] itself sees is Δ[n, g]·s_out[n] / s_in[k]. A forward stores nothing: no effective weight outlives it.

Where the weight stays in host memory (model/latent_stream.py), `source` gives it on the device; everything here goes through `latent()`.

With `noise` set, x [V·B, ..., K] is cut into V equal parts along dim 0, and part v is multiplied with Q of W under variant v.

A FoldedNorm is an RMSNorm or LayerNorm whose weight w ⊘ s and bias (b - δ) ⊘ s are made in every forward ([H] numbers); b is 0 where
the norm has none: δ needs a bias that RMSNorm models lack. q_norm and k_norm of a head are folded in the same way, with s alone.

q, k and v are quantized by token and head as they enter the attention product (after rotary embedding), to `operand_bits` of their
attention module. Softmax and its product stay in the model's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from qzo_kernels.ops import full_precision_sums
from qzo_kernels.ops_asym import fake_quantize_rows
from qzo_kernels.ops_qat import LatentNoise, effective_weight
from qzo_kernels.reference_qat import FLOOR, clipped_grid, smoothed
from torch import Tensor, nn
from torch.nn import functional

from qzo.errors import BadInput
from qzo.model.smoothing import Channels, Place, places

WEIGHT_BITS, ACTIVATION_BITS = (2, 3, 4, 6, 8, 16), (4, 6, 8, 16)
LWC = 3.0  # the logit that clipping begins with
ATTENTION = "qzo_quantized"


@dataclass(frozen=True)
class Precision:
    """bits of weights: 2, 3, 4, 6, 8, or 16 for none; of activations (with q, k, v): 4, 6, 8 or 16. group_size -1 is a whole row.

    Raises BadInput for others.
    """

    bits: int
    group_size: int
    activations: int

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, WEIGHT_BITS), ("activations", self.activations, ACTIVATION_BITS)):
            if value not in known:
                raise BadInput(name, str(value), f"{', '.join(map(str, known[:-1]))} bits, or {known[-1]} for no quantization")
        if self.group_size != -1 and self.group_size < 1:
            raise BadInput("group_size", str(self.group_size), "a positive whole number, or -1 for whole rows")


class FakeQuantLinear(nn.Module):
    """Takes the place of a Linear and holds its tensors. See the head of this file for what is stored."""

    def __init__(self, linear: nn.Linear, precision: Precision, before: Channels | None, after: Channels | None, own: bool):
        super().__init__()
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        self.weight, self.bias = linear.weight, linear.bias
        # `own`: nothing before this module shifts and scales its input.
        self.before, self.after, self.own = before, after, own
        self.low = self.high = self.factor = self.move = self.span = self.step = self.zero = self.offset = None
        self.noise: LatentNoise | None = None
        self.source: Callable[[], Tensor] | None = None
        device = linear.weight.device
        if precision.activations < 16:
            self.span = nn.Parameter(torch.ones(1, device=device), requires_grad=False)
        if precision.bits < 16:
            size = linear.in_features if precision.group_size == -1 else precision.group_size
            shape = (linear.out_features, -(-linear.in_features // size))
            for name, value in (("low", LWC), ("high", LWC), ("factor", 1.0), ("move", 0.0)):
                setattr(self, name, nn.Parameter(torch.full(shape, value, device=device), requires_grad=False))
        self.refresh()

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """s_in fp32 [K] and s_out fp32 [N], None for ones."""
        return None if self.before is None else self.before.scale(), None if self.after is None else self.after.scale()

    def latent(self) -> Tensor:
        """W [N, K] on the device, for operations that are launched before another layer's is asked for."""
        return self.weight.data if self.source is None else self.source()

    def hold(self, weight: Tensor) -> None:
        """Keep W in host memory. It is no parameter there: where a model's parameters are, its batches go."""
        del self.weight
        self.weight = weight

    def smoothed(self) -> Tensor:
        """S = s_in ⊙ W ⊘ s_out, fp32 [N, K]."""
        return smoothed(self.latent().float(), *self.scales())

    def grid(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(Δ, z) fp32 [N, G] of the tensors as they are now."""
        if self.low is None:
            return None, None
        step, zero = clipped_grid(self.smoothed(), self.precision.bits, self.precision.group_size, self.low.data, self.high.data)
        top = (1 << self.precision.bits) - 1
        return (step * self.factor.data).clamp_(min=FLOOR), (zero + self.move.data).round_().clamp_(0, top)

    def shifted(self) -> Tensor | None:
        """The offset fp32 [N] of the tensors as they are now."""
        offset = None if self.bias is None else self.bias.data.float()
        shift = None if self.before is None else self.before.shift()
        if shift is not None:
            moved = self.latent().float() @ shift
            offset = moved if offset is None else offset + moved
        if self.after is not None:
            shift = self.after.shift()
            if shift is not None:
                offset = -shift if offset is None else offset - shift
            offset = offset if offset is None else offset / self.after.scale()
        return offset

    def refresh(self) -> None:
        """The grid and the offset of the tensors as they are now: once per update, not in a forward."""
        step, zero = self.grid()
        self.step, self.zero = _written(self.step, step), _written(self.zero, zero)
        self.refresh_offset()

    def refresh_offset(self) -> None:
        """The offset alone: where weights move and the grid stays."""
        self.offset = _written(self.offset, self.shifted())

    def effective_weight(self, dtype: torch.dtype, noise: LatentNoise | None = None) -> Tensor:
        """Q(S; Δ, z) [V, N, K] of dtype, on the frozen grid, of W under `noise`; V = 1 without."""
        if self.step is None:
            return self.smoothed().to(dtype)[None]
        bits, size = self.precision.bits, self.precision.group_size
        return effective_weight(self.latent(), self.step, self.zero, bits, size, dtype, *self.scales(), noise)

    def arrived(self, x: Tensor) -> Tensor:
        """The input [..., K], shifted and scaled here if nobody did."""
        return ((x - self.before.shift()) / self.before.scale()).to(x.dtype) if self.own else x

    def received(self, x: Tensor) -> Tensor:
        """The input [..., K] as the product sees it: `arrived`, and quantized."""
        return fake_quantize_rows(self.arrived(x), self.precision.activations, self.span)

    def forward(self, x: Tensor) -> Tensor:
        self.latent()  # a streamed one may change as it arrives, and the offset with it
        offset, noise, given = None if self.offset is None else self.offset.to(x.dtype), self.noise, self.received(x)
        if x.is_cuda:
            full_precision_sums()
        if noise is None:
            return functional.linear(given, self.effective_weight(x.dtype)[0], offset)
        if len(x) % len(noise.eps):
            raise ValueError(f"x: {len(x)} along dim 0; expected a multiple of the {len(noise.eps)} variants of the noise")
        parts, done = given.chunk(len(noise.eps)), []
        # Two weights in memory at a time: those of a pair are made in one pass.
        for states, eps in zip(noise.states.split(2), noise.eps.split(2), strict=True):
            weights = self.effective_weight(x.dtype, noise._replace(states=states, eps=eps))
            done += [functional.linear(part, weight, offset) for part, weight in zip(parts[len(done) :], weights, strict=False)]
            del weights
        return torch.cat(done)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.precision}"


def _written(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new` at the place of `old`, where there is one of its kind."""
    return new if old is None or old.device != new.device else old.copy_(new)


class FoldedNorm(nn.Module):
    """Takes the place of an RMSNorm (of llama, mistral, qwen2, qwen3) or a LayerNorm and holds its tensors. Without `after` they are folded already."""

    def __init__(self, norm: nn.Module, after: Channels | None):
        super().__init__()
        self.centred = isinstance(norm, nn.LayerNorm)
        self.weight, self.bias, self.after = norm.weight, getattr(norm, "bias", None), after
        self.variance_epsilon = norm.eps if self.centred else norm.variance_epsilon

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """weight w ⊘ s and bias (b - δ) ⊘ s [H], None where there is neither b nor δ, in the dtype of w."""
        if self.after is None:
            return self.weight, self.bias
        scale, shift = self.after.scale(), self.after.shift()
        bias = None if self.bias is None else self.bias.float()
        if shift is not None:
            bias = -shift if bias is None else bias - shift
        dtype = self.weight.dtype
        return (self.weight.float() / scale).to(dtype), None if bias is None else (bias / scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.folded()
        if self.centred:
            return functional.layer_norm(x, weight.shape, weight, bias, self.variance_epsilon)
        wide = x.float()
        y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)
        return y if bias is None else y + bias


def prepare_layer(layer: nn.Module, precision: Precision, smoothing: bool) -> dict[str, Place]:
    """Replace the Linears and norms of a decoder layer, in place. The sites come back by name and are its `sites`; none without smoothing.

    The layer's weights must be in memory. A change of a site or a clipping is seen after `refresh_layer`. Raises BadInput for a layer
    that cannot be smoothed.
    """
    found = places(layer) if smoothing else {}
    makers = {name: channels for place in found.values() for name, channels in place.makers.items()}
    readers = {name: (channels, not place.makers) for place in found.values() for name, channels in place.readers.items()}
    for name, module in list(layer.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear):
            before, own = readers.get(name, (None, False))
            setattr(layer.get_submodule(parent), child, FakeQuantLinear(module, precision, before, makers.get(name), own))
        elif name in makers:
            setattr(layer.get_submodule(parent), child, FoldedNorm(module, makers[name]))
    layer.sites = nn.ModuleDict({name: place.site for name, place in found.items()})
    layer.self_attn.operand_bits = precision.activations
    return found


def refresh_layer(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, FakeQuantLinear):
            module.refresh()


def quantize_operands(model: nn.Module) -> None:
    """Make the attention of a transformers model quantize q, k and v where a layer has `operand_bits`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bits = getattr(module, "operand_bits", 16)
    return sdpa_attention_forward(module, *(fake_quantize_rows(t, bits) for t in (q, k, v)), mask, **kwargs)


def quantizer_state(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a prepared layer that belong to no checkpoint of the model: clipping, what moves a grid, spans and sites, by name."""
    names = (".low", ".high", ".factor", ".move", ".span")
    return {n: p.data for n, p in layer.named_parameters() if n.endswith(names) or n.startswith("sites.")}


def load_quantizer_state(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What `quantizer_state` gave, into a layer prepared in the same way."""
    for name, tensor in quantizer_state(layer).items():
        tensor.copy_(tensors[name])
    refresh_layer(layer)
