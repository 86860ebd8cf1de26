"""First-order reconstruction of one decoder layer, as OmniQuant (arXiv 2308.13137) does it and ZeroQAT (arXiv 2509.00031) begins with.

    c, s, δ = argmin E,   E of quantize/initialize.py      c: the logits of LWC of every Linear; s, δ: the sites, where there are any

by AdamW without decay on one window after another, with gradients that go back through this one layer: the only back-propagation of the
project. Rounding is the identity backwards (straight-through), clamping is itself, and a grid (Δ, z) follows its range, weights' and tokens':

    x̂ = Δ · (clamp(⌊x / Δ⌉ + z) - z)      ∂⌊u⌉ / ∂u = 1

Weights, spans, factor and move stay. s moves as s·exp(t), t at first 0: it remains positive, and a step is a part of s, whatever its size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from qzo_kernels.reference_qat import FLOOR, grouped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qzo.model.qat import FakeQuantLinear, load_quantizer_state, quantizer_state
from qzo.quantize.inputs import run_layer

LR_SITES, LR_LOGITS = 5e-3, 1e-2  # OmniQuant's at first, then down to 0 along a cosine: E falls mostly as they do
EPS = 1e-15  # one of very many logits has little to do with E
ATTENTION = "qzo_straight_through"


def relative_error(out: Tensor, wanted: Tensor) -> Tensor:
    """‖out - wanted‖² / ‖wanted‖² of every token, of outputs [..., H]."""
    wanted = wanted.float()
    return (out.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_(min=1e-30)


def reconstruct(
    layer: nn.Module, hidden: list[Tensor], wanted: list[Tensor], kwargs: dict, device: torch.device, epochs: int, error: Callable[[], float]
) -> tuple[float, float, int]:  # fmt: skip
    """Move the quantizer of a prepared fp32 layer for some passes over its inputs, and leave it as it was after the best of them, or before.

    hidden: inputs fp32 [windows, length, H], by parts; wanted: the outputs of the layer of 16 bits for them, alike; both anywhere. error()
    measures the layer as it is. Returns error() before, error() in the end, and the number of passes that were kept. Raises what PyTorch
    does where memory is short: beside the layer there are three times its weights, four with smoothing, and one window's activations.
    """
    function, windows = Straight(layer), [window for part in zip(hidden, wanted, strict=True) for window in zip(*part, strict=True)]
    groups = [{"params": function.logits, "lr": LR_LOGITS}, {"params": function.moves, "lr": LR_SITES}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=EPS)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(windows))
    order, leaves = torch.Generator().manual_seed(0), function.logits + function.moves
    before = least = error()
    best, kept = [leaf.detach().clone() for leaf in leaves], 0
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(windows), generator=order).tolist():
            x, y = (window[None].to(device) for window in windows[index])
            with torch.enable_grad():
                relative_error(function(x, kwargs), y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        function.store()
        found = error()
        if found < least:
            least, best, kept = found, [leaf.detach().clone() for leaf in leaves], epoch
    for leaf, value in zip(leaves, best, strict=True):
        leaf.data.copy_(value)
    function.store()
    return before, least, kept


class Straight:
    """A prepared layer as a function of its quantizer, through which gradients flow. On a CPU its outputs are the layer's, bit for bit.

    `logits` and `moves` are the leaves: low and high fp32 [N, G] of every Linear; t and, where there is one, δ fp32 [entries] of every site.
    The layer changes by `store` alone. factor and move must be 1 and 0, as `prepare_layer` leaves them.
    """

    def __init__(self, layer: nn.Module):
        self.layer, state = layer, quantizer_state(layer)
        kinds = {name: name.rpartition(".")[2] for name in state}
        self._bounds = {name: _leaf(state[name]) for name, kind in kinds.items() if kind in ("low", "high")}
        self._shifts = {name: _leaf(state[name]) for name, kind in kinds.items() if kind == "shift"}
        # s before the first step, and t.
        self._scales = {name: (state[name].clone(), _leaf(torch.zeros_like(state[name]))) for name, kind in kinds.items() if kind == "scale"}
        self.logits = [*self._bounds.values()]
        self.moves = [*(t for _, t in self._scales.values()), *self._shifts.values()]

    def _tensors(self) -> dict[str, Tensor]:
        """The layer's parameters as the leaves have them, by name."""
        return self._bounds | self._shifts | {name: first * t.exp() for name, (first, t) in self._scales.items()}

    @torch.no_grad()
    def store(self) -> None:
        """Write the leaves into the layer."""
        load_quantizer_state(self.layer, quantizer_state(self.layer) | self._tensors())

    def __call__(self, x: Tensor, kwargs: dict) -> Tensor:
        """The output for x, both fp32 [B, length, H]."""
        tensors = self._tensors()
        # On a GPU other backward passes of attention sum in any order: a resumed search would end elsewhere.
        with self._swapped(), sdpa_kernel(SDPBackend.MATH) if x.is_cuda else nullcontext():
            return run_layer(lambda *given, **named: functional_call(self.layer, tensors, given, named), x, kwargs)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attention)
        config = self.layer.self_attn.config
        usual, config._attn_implementation = config._attn_implementation, ATTENTION
        linears = [module for module in self.layer.modules() if isinstance(module, FakeQuantLinear)]
        for linear in linears:
            linear.forward = partial(_product, linear)
        try:
            yield
        finally:
            config._attn_implementation = usual
            for linear in linears:
                del linear.forward


def _product(linear: FakeQuantLinear, x: Tensor) -> Tensor:
    """y of the head of model/qat.py."""
    weight, precision = linear.smoothed(), linear.precision
    if linear.low is not None:
        weight = _clipped(weight, linear.low, linear.high, precision.bits, precision.group_size)
    return functional.linear(_rows(linear.arrived(x), precision.activations, linear.span), weight, linear.shifted())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _straight(x: Tensor) -> Tensor:
    """⌊x⌉, exactly, and the identity backwards."""
    return x + (x.round() - x).detach()


def _on_range(x: Tensor, least: Tensor, most: Tensor, bits: int) -> Tensor:
    """x̂ on the grid of a range; the three broadcast. Of a range that holds 0, z is a code without being clamped to one."""
    top = (1 << bits) - 1
    step = ((most - least) / least.new_full((), top)).clamp(min=FLOOR)
    zero = _straight(-least / step)
    return ((_straight(x / step) + zero).clamp(0, top) - zero) * step


def _clipped(weight: Tensor, low: Tensor, high: Tensor, bits: int, group_size: int) -> Tensor:
    """Q(S) fp32 [N, K] on the grid of its logits, as `clipped_grid` has it."""
    groups = grouped(weight, group_size)
    least = groups.amin(-1).clamp(max=0) * low.double().sigmoid().float()
    most = groups.amax(-1).clamp(min=0) * high.double().sigmoid().float()
    return _on_range(groups, least[..., None], most[..., None], bits).flatten(-2)[:, : weight.shape[1]]


def _rows(x: Tensor, bits: int, span: Tensor | None = None) -> Tensor:
    """x̂ of x [..., C], as `fake_quantize_rows` has it."""
    if bits == 16:
        return x
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # of aminmax PyTorch 2.11 has no derivative
    if span is not None:
        least, most = torch.where(least < 0, least * span, least), torch.where(most > 0, most * span, most)
    return _on_range(x, least, most, bits)


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *(_rows(t, module.operand_bits) for t in (q, k, v)), mask, **kwargs)
