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
from qzo_kernels.reference_qat import FLOOR, grouped, smoothed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qzo.model.qat import FakeQuantLinear, FoldedNorm, refresh_layer
from qzo.model.smoothing import Channels, Site
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
        self.layer, modules = layer, list(layer.modules())
        self._linears = [module for module in modules if isinstance(module, FakeQuantLinear)]
        self._norms = [module for module in modules if isinstance(module, FoldedNorm)]
        self._bounds = {m: (_leaf(m.low), _leaf(m.high)) for m in self._linears if m.low is not None}
        # Per site: s before the first step, t, δ.
        self._sites = {m: (m.scale.detach().clone(), _leaf(torch.zeros_like(m.scale)), None if m.shift is None else _leaf(m.shift))
                       for m in modules if isinstance(m, Site)}  # fmt: skip
        self.logits = [bound for bounds in self._bounds.values() for bound in bounds]
        self.moves = [leaf for _, *pair in self._sites.values() for leaf in pair if leaf is not None]
        self._seen: dict[Site, tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def store(self) -> None:
        """Write the leaves into the layer."""
        for linear, bounds in self._bounds.items():
            linear.low.data, linear.high.data = (bound.detach().clone() for bound in bounds)
        for site, (first, t, shift) in self._sites.items():
            site.scale.data.copy_(first * t.exp())
            if shift is not None:
                site.shift.data.copy_(shift)
        refresh_layer(self.layer)

    def __call__(self, x: Tensor, kwargs: dict) -> Tensor:
        """The output for x, both fp32 [B, length, H]."""
        self._seen = {site: (first * t.exp(), shift) for site, (first, t, shift) in self._sites.items()}
        # On a GPU other backward passes of attention sum in any order: a resumed search would end elsewhere.
        with self._swapped(), sdpa_kernel(SDPBackend.MATH) if x.is_cuda else nullcontext():
            return run_layer(self.layer, x, kwargs)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attention)
        config = self.layer.self_attn.config
        usual, config._attn_implementation = config._attn_implementation, ATTENTION
        swaps = [(linear, "forward", self._product) for linear in self._linears] + [(norm, "folded", self._folded) for norm in self._norms]
        for module, name, function in swaps:
            setattr(module, name, partial(function, module))
        try:
            yield
        finally:
            config._attn_implementation = usual
            for module, name, _ in swaps:
                delattr(module, name)

    def _scale(self, channels: Channels | None) -> Tensor | None:
        if channels is None:
            return None
        scale = self._seen[channels.site][0]
        scale = scale.reciprocal() if channels.inverse else scale
        return scale if channels.index is None else scale[channels.index]

    def _shift(self, channels: Channels | None) -> Tensor | None:
        shift = None if channels is None else self._seen[channels.site][1]
        return shift if shift is None or channels.index is None else shift[channels.index]

    def _product(self, linear: FakeQuantLinear, x: Tensor) -> Tensor:
        """y of the head of model/qat.py."""
        s_in, s_out, d_in, d_out = (of(channels) for of in (self._scale, self._shift) for channels in (linear.before, linear.after))
        offset = linear.bias
        if d_in is not None:
            offset = linear.weight @ d_in if offset is None else offset + linear.weight @ d_in
        if d_out is not None:
            offset = -d_out if offset is None else offset - d_out
        if s_out is not None and offset is not None:
            offset = offset / s_out
        weight, bits = smoothed(linear.weight, s_in, s_out), linear.precision.bits
        if linear in self._bounds:
            weight = _clipped(weight, *self._bounds[linear], bits, linear.precision.group_size)
        x = (x - d_in) / s_in if linear.own else x
        return functional.linear(_rows(x, linear.precision.activations, linear.span), weight, offset)

    def _folded(self, norm: FoldedNorm) -> tuple[Tensor, Tensor | None]:
        scale, shift, bias = self._scale(norm.after), self._shift(norm.after), norm.bias
        if shift is not None:
            bias = -shift if bias is None else bias - shift
        return norm.weight / scale, None if bias is None else bias / scale


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
