"""Initial clipping and smoothing of ZeroQAT, one decoder layer in memory at a time, by forwards alone unless `reconstruct` asks for more.

One stream of calibration windows goes through the layers, that of the model quantized so far. Of a layer

    E = mean over tokens of ‖F(h) - F̂(h)‖² / ‖F(h)‖²         F the 16-bit layer, F̂ the quantized one, on the same inputs h

is measured: what this layer adds, for nothing that is searched here could make up for the layers before. By token, since the next norm
divides by a token's size. In this order:
1. smoothing, site by site (only with low-bit activations): δ on or off, exponent a of the rule s = max|X - δ|^a / max|W|^(1 - a), or no scale;
2. by sets of Linears with one input, in call order: the span of its tokens' grids (only with low-bit activations); then the clipping of their
   weights (quantize/clipping.py), on the inputs that the quantized Linears before them produce;
3. with `reconstruct`: clipping and smoothing moved together along gradients (quantize/reconstruct.py);
4. with `compensation`: latents whose rounding makes up for itself (quantize/compensate.py), of each set as soon as it is done with 2, or 3.

Each kept only where it lowers E.

Out comes per layer what a target moves later, `quantizer_state` of model/qat.py: {"<linear>.low", "<linear>.high": fp32 [N, G],
"<linear>.span": fp32 [1], "sites.<site>.scale", "sites.<site>.shift": fp32}.
The paper lets a first-order reconstruction of the block do all of it (OmniQuant). Here forwards alone do, and 3, where it is asked for, goes on
from what they found: nothing else in this project has a backward pass. The paper has neither a span nor 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.load import fill, release
from qzo.model.qat import FakeQuantLinear, Precision, prepare_layer, quantize_operands, quantizer_state, refresh_layer
from qzo.model.smoothing import Place
from qzo.quantize.clipping import search_bounds
from qzo.quantize.compensate import BITS as COMPENSATED
from qzo.quantize.compensate import compensated
from qzo.quantize.inputs import Seen, add_second_moment, decoder_layers, first_inputs, mirror_upper, run_layer
from qzo.quantize.ranges import Ranges
from qzo.quantize.reconstruct import reconstruct, relative_error

PAPER, EXPONENTS = 0.75, (0.5, 0.65, 0.85, 1.0)
SEARCH_TOKENS = 2048  # that all but the bounds are chosen on, in windows spread evenly
SPANS = (0.9, 0.8, 0.7, 0.6)
NO_CLIPPING = float("inf")


@dataclass(frozen=True)
class Initialization:
    """What is searched. Without clipping a grid covers its whole group: rounding to nearest, if there is no smoothing either."""

    precision: Precision
    smoothing: bool
    clipping: bool
    spans: bool = True  # with clipping: of activations too. The paper has none
    compensation: bool = False  # with clipping: the latents move as well. The paper has none of it either
    reconstruct: int = 0  # with clipping: passes of first-order reconstruction before the latents move

    @property
    def compensates(self) -> bool:
        return self.compensation and self.precision.bits in COMPENSATED


@torch.no_grad()
def initialize(
    model: nn.Module, folder: Folder, windows: Tensor, what: Initialization, device: torch.device, dtype: torch.dtype,
    keep: Callable[[int, dict[str, Tensor], float], None], report: Callable[[str], None],
    done: int = 0, read: Callable[[str], Tensor] | None = None,
) -> None:  # fmt: skip
    """Search layer after layer of a model whose parameters are on meta; windows int64 [samples, length].

    keep(index, tensors, √E) is given each layer's `found`, on the CPU, when it is done; report(text) a line per choice.
    The first `done` layers are not searched: read(name) gives what `keep` was given, by the layer's name and the tensor's.
    Raises BadInput for weights that are not finite, RunFailed for such outputs of a layer.
    """
    prefix, layers = decoder_layers(model)
    quantize_operands(model)
    hidden, kwargs = first_inputs(model, folder, windows, device, dtype)
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        fill(model, folder, device, dtype, f"{name}.")
        for inner, parameter in layer.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise BadInput(f"{folder.path}, {name}.{inner}", "infinities or NaN", "finite weights")
        if index < done:
            prepare_layer(layer, what.precision, what.smoothing)
            restore(layer, {inner: read(f"{name}.{inner}") for inner in found(layer)})
        else:
            stored = folder.read(f"{name}.{next(inner for inner, module in layer.named_modules() if isinstance(module, nn.Linear))}.weight").dtype
            block = Block(layer, hidden, kwargs[index], device, stored, report)
            if not bool(block.wanted.isfinite().all()):
                raise RunFailed(name, "activations that are not finite", "finite ones", "Check the model's weights and the calibration text.")
            block.search(what)
            error = block.error() ** 0.5
            report(f"layer {index}: error {error:.4f}")
            keep(index, {inner: tensor.cpu() for inner, tensor in found(layer).items()}, error)
        for i, part in enumerate(hidden):
            hidden[i] = run_layer(layer, part.to(device), kwargs[index]).cpu()
        release(layer)


def found(layer: nn.Module) -> dict[str, Tensor]:
    """`quantizer_state` of a prepared layer, and its latents [N, K]."""
    fakes = ((name, module) for name, module in layer.named_modules() if isinstance(module, FakeQuantLinear))
    return quantizer_state(layer) | {f"{name}.weight": module.weight.data for name, module in fakes}


def restore(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What `found` gave, into a layer prepared in the same way."""
    for name, tensor in found(layer).items():
        tensor.copy_(tensors[name])
    refresh_layer(layer)


class Block:
    """One decoder layer, still of 16 bits; `hidden` are its inputs [windows, length, H] in the quantized model, by parts.

    stored: the dtype in which latents will be written.
    """

    def __init__(
        self, layer: nn.Module, hidden: list[Tensor], kwargs: dict, device: torch.device, stored: torch.dtype, report: Callable[[str], None]
    ):  # fmt: skip
        self.layer, self.hidden, self.kwargs, self.device, self.stored, self.report = layer, hidden, kwargs, device, stored, report
        windows = [window for part in hidden for window in part]
        self.some = torch.stack(windows[:: max(1, len(windows) * len(windows[0]) // SEARCH_TOKENS)]).to(device)
        self.wanted = run_layer(layer, self.some, kwargs)

    def search(self, what: Initialization) -> None:
        """Prepare the layer and set its sites and bounds."""
        wanted = [run_layer(self.layer, part.to(self.device), self.kwargs).cpu() for part in self.hidden] if what.reconstruct else []
        places = prepare_layer(self.layer, what.precision, what.smoothing)
        linears = {name: module for name, module in self.layer.named_modules() if isinstance(module, FakeQuantLinear)}
        if not what.clipping:
            for bound in (bound for linear in linears.values() for bound in (linear.low, linear.high) if bound is not None):
                bound.data.fill_(NO_CLIPPING)
            refresh_layer(self.layer)
        if places:
            ranges = self._ranges(places)
            for name, place in places.items():
                self._smooth(name, place, ranges[name])
        if what.clipping:
            sets = self._sets(linears)
            for names in sets:
                self._clip(names, linears, what)
            if what.reconstruct:
                self._reconstruct(wanted, what.reconstruct)
                for names in sets if what.compensates else []:
                    self._compensate(names, linears, self._hessian(linears[names[0]]))

    def error(self) -> float:
        """E on some of the windows."""
        return float(relative_error(run_layer(self.layer, self.some, self.kwargs), self.wanted).mean())

    def _ranges(self, places: dict[str, Place]) -> dict[str, Ranges]:
        """What goes through the sites of the prepared layer while they are all at 1 and 0."""
        ranges, handles = {}, []
        for name, place in places.items():
            found = ranges[name] = Ranges(len(place.site.scale), self.device)
            if not place.readers:
                for maker, channels in place.makers.items():
                    seen = found.keys if channels.inverse else found.inputs
                    handles.append(self.layer.get_submodule(maker).register_forward_hook(lambda m, a, y, s=seen, c=channels: s.add(y, c.index)))
                continue
            for reader, channels in place.readers.items():
                linear = self.layer.get_submodule(reader)
                found.keys.add(linear.weight, channels.index)
                if reader == next(iter(place.readers)):
                    handles.append(linear.register_forward_pre_hook(lambda m, a, s=found.inputs, c=channels: s.add(a[0], c.index)))
        run_layer(self.layer, self.some, self.kwargs)
        for handle in handles:
            handle.remove()
        return ranges

    def _smooth(self, name: str, place: Place, ranges: Ranges) -> None:
        """δ by the exponent of the paper, then the exponent; nothing at all where nothing helps."""
        site, none = place.site, None if place.site.shift is None else torch.zeros_like(place.site.shift)
        shifts = [none] if none is None else [none, ranges.inputs.middle()]
        before = self.error()
        tried = {(None, False): (before, torch.ones_like(site.scale), none)}

        def attempt(exponent: float, shifted: bool) -> None:
            scale = ranges.scale(exponent, shifts[shifted])
            self._set(place, scale, shifts[shifted])
            tried[exponent, shifted] = (self.error(), scale, shifts[shifted])

        for shifted in range(len(shifts)):
            attempt(PAPER, bool(shifted))
        shifted = min(tried, key=lambda key: tried[key][0])[1]
        for exponent in EXPONENTS:
            attempt(exponent, shifted)
        (exponent, shifted), (least, scale, shift) = min(tried.items(), key=lambda item: item[1][0])
        self._set(place, scale, shift)
        self.report(f"  {name}: exponent {exponent}, δ {'on' if shifted else 'off'}, error {before ** 0.5:.4f} -> {least ** 0.5:.4f}")

    def _set(self, place: Place, scale: Tensor, shift: Tensor | None) -> None:
        place.site.scale.data.copy_(scale)
        if shift is not None:
            place.site.shift.data.copy_(shift)
        for name in (*place.makers, *place.readers):
            module = self.layer.get_submodule(name)
            if isinstance(module, FakeQuantLinear):
                module.refresh()

    def _sets(self, linears: dict[str, FakeQuantLinear]) -> list[list[str]]:
        """Names of Linears in call order, those with one input together."""
        inputs: list[Tensor] = []
        sets: list[list[str]] = []

        def see(name: str, x: Tensor) -> None:
            if not inputs or inputs[-1] is not x:
                inputs.append(x)
                sets.append([])
            sets[-1].append(name)

        handles = [m.register_forward_pre_hook(lambda _, args, n=n: see(n, args[0])) for n, m in linears.items()]
        run_layer(self.layer, self.some[:1], self.kwargs)
        for handle in handles:
            handle.remove()
        return sets

    def _clip(self, names: list[str], linears: dict[str, FakeQuantLinear], what: Initialization) -> None:
        if what.spans and linears[names[0]].span is not None:
            self._span([linears[name] for name in names])
        if linears[names[0]].low is None:
            return
        hessian = self._hessian(linears[names[0]])

        def clip(linear: FakeQuantLinear) -> None:
            linear.low.data, linear.high.data = search_bounds(linear.smoothed(), linear.precision.bits, linear.precision.group_size, hessian)

        self._attempt("clipping", names, linears, clip)
        if what.compensates and not what.reconstruct:
            self._compensate(names, linears, hessian)

    def _compensate(self, names: list[str], linears: dict[str, FakeQuantLinear], hessian: Tensor) -> None:
        def compensate(linear: FakeQuantLinear) -> None:
            linear.weight.data = compensated(linear, hessian).to(self.stored).to(linear.weight.dtype)

        self._attempt("compensation", names, linears, compensate)

    def _reconstruct(self, wanted: list[Tensor], epochs: int) -> None:
        done = count()

        def measured() -> float:
            found = self.error()
            self.report(f"  first-order, epoch {next(done)} of {epochs}: error {found ** 0.5:.4f}")
            return found

        before, after, kept = reconstruct(self.layer, self.hidden, wanted, self.kwargs, self.device, epochs, measured)
        self.report(f"  first-order, {kept} of {epochs} epochs kept, error {before ** 0.5:.4f} -> {after ** 0.5:.4f}")

    def _attempt(self, what: str, names: list[str], linears: dict[str, FakeQuantLinear], change: Callable[[FakeQuantLinear], None]) -> None:
        """Change Linears of one input; change them back where the error is no lower."""
        before, old = self.error(), {}
        for name in names:
            linear = linears[name]
            old[name] = (linear.low.data, linear.high.data, linear.weight.data)
            change(linear)
            linear.refresh()
        after = self.error()
        self.report(f"  {' '.join(name.rpartition('.')[2] for name in names)}: {what}, error {before ** 0.5:.4f} -> {after ** 0.5:.4f}")
        if after < before:
            return
        for name, tensors in old.items():
            linears[name].low.data, linears[name].high.data, linears[name].weight.data = tensors
            linears[name].refresh()

    def _span(self, linears: list[FakeQuantLinear]) -> None:
        errors = {}
        for span in (1.0, *SPANS):
            for linear in linears:
                linear.span.data.fill_(span)
            errors[span] = self.error()
        best = min(errors, key=errors.get)
        for linear in linears:
            linear.span.data.fill_(best)
        self.report(f"  span {best}, error {errors[1.0] ** 0.5:.4f} -> {errors[best] ** 0.5:.4f}")

    def _hessian(self, linear: FakeQuantLinear) -> Tensor:
        """XᵀX fp32 [K, K] of a Linear's inputs, as its product sees them."""
        hessian = torch.zeros(linear.in_features, linear.in_features, device=self.device)

        def accumulate(_: nn.Module, args: tuple[Tensor]) -> None:
            add_second_moment(hessian, linear.received(args[0]).flatten(0, -2).float())
            raise Seen

        handle = linear.register_forward_pre_hook(accumulate)
        for part in self.hidden:
            try:
                run_layer(self.layer, part.to(self.device), self.kwargs)
            except Seen:
                pass
        handle.remove()
        mirror_upper(hessian)
        return hessian
