"""ZeroQAT (arXiv 2509.00031): perturb and move the latent weights, through a quantizer whose grid the ± pair shares.

    l± = L(Q(W ± ε·unit·u)),   d = (l+ - l-) / 2ε
    W ← W - Σ_i c_i·unit·u_i                            direction `latent`
    W ← W - c·unit·r,   r = (q+ - q-) / 2ε              direction `realized`: along the codes that the pair differed in

unit is the step that a weight sees on the grid of the base checkpoint, Δ[n, g]·s_out[n] / s_in[k] (`relative`), or 1; it is constant in
a run, so that a replay knows no other tensor than W. Latents are fp32: smaller ones lose updates. Through a hard quantizer the
signal-to-noise of u is 0.02, 0.25, 0.7 at ε = 0.01, 0.1, 0.3 steps, that of r 0.95 (tests/zo/test_hard_quantizer.py).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from qzo_kernels import ops_qat
from qzo_kernels.reference_qat import grid_codes, smoothed
from torch import Tensor, nn

from qzo.model.qat import FakeQuantLinear
from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.targets import TensorInfo, layers_under_noise

_AT_ONCE = 1 << 21  # elements that statistics look at: intermediate tensors of some ten of these


class Units(NamedTuple):
    """What a latent's update needs beside the journal: its unit, rows fp32 [N, G] times cols fp32 [K], and the grid of the realized difference."""

    group_size: int
    rows: Tensor | None
    cols: Tensor | None
    realized: ops_qat.Realized | None


class Streamed(Protocol):
    """What a target asks of latents in host memory: see model/latent_stream.py."""

    def update(self, change: Callable[[FakeQuantLinear, Tensor, Tensor, Tensor], None], state: Tensor, coefs: Tensor) -> None: ...

    def settle(self) -> None: ...


def units_of(layer: FakeQuantLinear, relative: bool, realized_eps: float | None) -> Units:
    """Of a layer as the base checkpoint has it; realized_eps: ε where the direction is `realized`, else None."""
    bits, group_size = layer.precision.bits, layer.precision.group_size
    (s_in, s_out), rows, cols, realized = layer.scales(), None, None, None
    if relative:
        rows = layer.step.clone() if s_out is None else layer.step * s_out[:, None]
        cols = None if s_in is None else s_in.reciprocal()
    if realized_eps is not None:
        realized = ops_qat.Realized(layer.step.clone(), layer.zero.clone(), bits, s_in, s_out, realized_eps)
    return Units(group_size, rows, cols, realized)


def move_(weight: Tensor, state: Tensor, coefs: Tensor, uid: int, units: Units, gaussian: bool) -> None:
    """What `Latent.apply` does to one tensor: weight fp32 [N, K] in place; state int64 [2], coefs fp32 [S, D].

    A weight in host memory is moved where the state is.
    """
    if weight.device != state.device:
        moved = weight.to(state.device)
        move_(moved, state, coefs, uid, units, gaussian)
        weight.copy_(moved)
        return
    ops_qat.update_latent_(weight, state, coefs, uid, units.group_size, units.rows, units.cols, gaussian, units.realized)


class Latent:
    """The weights [N, K] of FakeQuantLinears, as fp32 masters. `layers` maps module names to layers; order of the map is order of update.

    `read(name)` gives a parameter as the checkpoint holds it: it becomes the layer's weight, and the layer's grid is made of it. relative:
    eps and lr in steps; realized: of one direction per step, with `relative` alone. ValueError for no layers, or others.

    stream: brings the weights from host memory, where they are fp32 already (model/latent_stream.py); an update is then done when a
    layer is next used, and `state` has all of them done first. The bits are the same.
    """

    name = "latent"
    unit = 1.0

    def __init__(
        self, layers: dict[str, FakeQuantLinear], read: Callable[[str], Tensor], eps: float, lr: float, relative: bool = True,
        gaussian: bool = False, realized: bool = False, stream: Streamed | None = None,
    ):  # fmt: skip
        _check(layers, relative, realized)
        self.stream = stream
        self.eps, self.lr, self.relative, self.gaussian, self.realized, self._read = eps, lr, relative, gaussian, realized, read
        self.layers = {tensor_name(f"{name}.weight", self.name): layer for name, layer in layers.items()}
        check_unique(self.layers)
        for name, layer in self.layers.items() if stream is None else ():
            layer.weight = nn.Parameter(self._base(name, layer), requires_grad=False)
            layer.refresh()
        self._info = [TensorInfo(name, tensor_uid(name), tuple(layer.weight.shape), float("-inf")) for name, layer in self.layers.items()]
        self.units = {name: units_of(layer, relative, eps if realized else None) for name, layer in self.layers.items()}
        self._parts = {layer: (info.uid, self.units[info.name]) for info, layer in zip(self._info, self.layers.values(), strict=True)}

    def _base(self, name: str, layer: FakeQuantLinear) -> Tensor:
        return self._read(name.removesuffix("/latent")).to(layer.step.device, torch.float32, copy=True).contiguous()

    def parameters(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers.values()]

    def info(self) -> list[TensorInfo]:
        return self._info

    def settings(self) -> dict[str, Any]:
        return {"gaussian": self.gaussian, "realized": self.realized}

    def entered(self, variants: Variants) -> AbstractContextManager[None]:
        eps = variants.signs * self.eps
        units = self.units.values()
        noises = (ops_qat.LatentNoise(variants.states, eps, info.uid, u.rows, u.cols, self.gaussian) for info, u in zip(self._info, units, strict=True))
        return layers_under_noise(self.layers.values(), noises)

    def apply(self, state: Tensor, coefs: Tensor) -> None:
        if self.stream is not None:
            return self.stream.update(self._change, state, coefs)
        for layer in self.layers.values():
            self._change(layer, layer.weight.data, state, coefs)

    def _change(self, layer: FakeQuantLinear, weight: Tensor, state: Tensor, coefs: Tensor) -> None:
        """One step of one layer, of its weight on the device."""
        uid, units = self._parts[layer]
        move_(weight, state, coefs, uid, units, self.gaussian)
        layer.refresh_offset()

    def state(self) -> dict[str, Tensor]:
        if self.stream is not None:
            self.stream.settle()
        return {name: layer.weight.data for name, layer in self.layers.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])
        for layer in self.layers.values():
            layer.refresh_offset()

    def statistics(self, state: Tensor) -> dict[str, Any]:
        """On the grid as it is now: the share of codes that are not those of the base's weights, and that at either end of the grid; the root
        mean square of all that the weights moved, in steps."""
        count, changed, edge, square = 0, 0, 0, 0.0
        for name, layer in self.layers.items():
            found = _compared(layer, layer.latent(), self._base(name, layer))
            count, changed, edge, square = (a + b for a, b in zip((count, changed, edge, square), found, strict=True))
        return {"weights": count, "changed": changed / count, "saturated": edge / count, "rms_steps": math.sqrt(square / count)}

    def warning(self, coef: float, steps: int) -> str | None:
        """What is wrong with moving by `coef` (typical size of a recorded coefficient, all directions together) for `steps` more steps.

        A weight lies anywhere between two bounds of codes: moving by a thousandth of a step changes the code of one in a thousand.
        """
        if not self.relative or coef == 0:  # progress.Still says where d is 0
            return None
        most, chance, top = coef * steps, coef * steps**0.5, min((1 << layer.precision.bits) - 1 for layer in self.layers.values())
        said = f"{steps} steps move a weight by {most:.2g} of a grid step at most and {chance:.2g} by chance"
        if most < 1e-3:
            return f"{said}: hardly a code will ever change. Raise lr."
        return f"{said}, of a grid of {top} steps: codes will pile up at its ends. Lower lr." if chance > top / 4 else None


def _compared(layer: FakeQuantLinear, weight: Tensor, base: Tensor) -> tuple[int, int, int, float]:
    """Of two weights of a layer on its grid: (elements, codes that differ, codes of `weight` at an end, sum of squares of steps between them)."""
    bits, size, (s_in, s_out) = layer.precision.bits, layer.precision.group_size, layer.scales()
    columns = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] if size == -1 else size)
    changed, edge, square = 0, 0, 0.0
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _AT_ONCE // weight.shape[1])):
        step, zero, out = layer.step[rows], layer.zero[rows], None if s_out is None else s_out[rows]
        now, old = (smoothed(values[rows], s_in, out) for values in (weight, base))
        codes, other = (grid_codes(values, step, zero, bits, size) for values in (now, old))
        changed += int((codes != other).sum())
        edge += int(((codes == 0) | (codes == (1 << bits) - 1)).sum())
        square += float(((now - old) / step[:, columns]).double().square().sum())
    return weight.numel(), changed, edge, square


def _check(layers: dict[str, FakeQuantLinear], relative: bool, realized: bool) -> None:
    given = next((f"{type(v).__name__} {k}" for k, v in layers.items() if not isinstance(v, FakeQuantLinear) or v.low is None), None)
    if given or not layers:
        raise ValueError(f"Latent: given {given or 'no layer'}; expected FakeQuantLinears of 2 to 8 bits by name")
    if realized and not relative:
        raise ValueError("Latent: given realized without relative; expected both: a realized difference is counted in steps")
