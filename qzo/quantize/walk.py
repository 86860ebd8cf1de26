"""One decoder layer at a time: filled from disk, run on the calibration windows, quantized, written, released.

Linears of a layer that read the same input are quantized together, in the order in which the layer calls them, and
every later one sees the activations that the quantized earlier ones produce.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from qzo_kernels.pack import pack_codes, unpack_codes
from torch import Tensor, nn

from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.gptq_format import GptqConfig, pack_zeros, unpack_zeros
from qzo.model.load import fill, release
from qzo.model.save import FolderWriter
from qzo.quantize import gptq, rtn
from qzo.quantize.grid import Quantized
from qzo.quantize.inputs import Seen, add_second_moment, decoder_layers, first_inputs, mirror_upper, run_layer
from qzo.quantize.resume import LayerWriter


def linears(layer: nn.Module) -> list[str]:
    """Names of a layer's Linears."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


class Walk:
    """Quantizes the Linears of all decoder layers of a model whose parameters are on meta.

    `windows` int64 [samples, length] are the calibration tokens for GPTQ; None rounds to nearest, without a forward.
    `report(names, error)` is called after each set of Linears: error is ‖(W - Ŵ)X‖/‖WX‖ over the calibration inputs,
    and ‖W - Ŵ‖/‖W‖ when rounding to nearest. Raises BadInput for weights that are not finite, RunFailed for such
    activations.
    """

    def __init__(self, model: nn.Module, folder: Folder, config: GptqConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.folder, self.config, self.device, self.dtype = model, folder, config, device, dtype
        self.prefix, self.layers = decoder_layers(model)

    def documents(self, names: list[str]) -> tuple[dict[str, Any], dict[str, dict]]:
        """(quantization_config, further JSON files by name) of the folder in which the Linears `names` are quantized."""
        document = self.config.to_dict()
        return document, {"quantize_config.json": document}

    @torch.no_grad()
    def run(
        self, windows: Tensor | None, writer: LayerWriter, report: Callable[[list[str], float], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Quantize the layers that `writer` does not hold yet; `check` is called before every set, and may raise."""
        done = len(writer.layers)
        if done == len(self.layers):
            return
        hidden, kwargs = ([], []) if windows is None else self._first_inputs(windows)
        for index, layer in enumerate(self.layers):
            name = f"{self.prefix}.{index}"
            if windows is not None:
                fill(self.model, self.folder, self.device, self.dtype, f"{name}.")
            check()
            if index >= done:
                errors: list[float] = []
                for subset, hessian in self._sets(name, layer, hidden, kwargs[index] if kwargs else None):
                    check()
                    error = self._quantize(name, layer, subset, hessian, writer)
                    del hessian  # before the next is made
                    errors += [error] * len(subset)
                    report([f"{name}.{linear}" for linear in subset], error)
                writer.end_layer(errors)
            elif windows is not None:
                self._restore(name, layer, writer)
            for i, part in enumerate(hidden):
                hidden[i] = run_layer(layer, part.to(self.device), kwargs[index]).cpu()
            release(layer)

    def _sets(
        self, name: str, layer: nn.Module, hidden: list[Tensor], kwargs: dict | None
    ) -> Iterator[tuple[list[str], Tensor | None]]:
        """Linears of one input and its second moment, made when it is asked for; one by one without calibration."""
        if kwargs is None:
            yield from (([linear], None) for linear in linears(layer))
            return
        for subset in _subsets(layer, hidden[0].to(self.device), kwargs):
            yield subset, self._hessian(name, layer, subset[0], hidden, kwargs)

    def _restore(self, name: str, layer: nn.Module, writer: LayerWriter) -> None:
        """Put the Ŵ of a layer that is done into it: the values that it was left with."""
        for linear in linears(layer):
            weight = layer.get_submodule(linear).weight
            weight.copy_(read_linear(writer, f"{name}.{linear}", *weight.shape, self.config, self.device).dequantize())

    def _first_inputs(self, windows: Tensor) -> tuple[list[Tensor], list[dict]]:
        return first_inputs(self.model, self.folder, windows, self.device, self.dtype)

    def _hessian(self, name: str, layer: nn.Module, linear: str, hidden: list[Tensor], kwargs: dict) -> Tensor:
        """XᵀX / rows, fp32 [K, K], of all the inputs of a Linear."""
        module = layer.get_submodule(linear)
        hessian = torch.zeros(module.in_features, module.in_features, device=self.device)
        rows = 0

        def accumulate(_: nn.Module, args: tuple[Tensor]) -> None:
            nonlocal rows
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            rows += len(x)
            add_second_moment(hessian, x)
            raise Seen

        handle = module.register_forward_pre_hook(accumulate)
        for part in hidden:
            try:
                layer(part.to(self.device), **kwargs)
            except Seen:
                pass
        handle.remove()
        if not bool(torch.isfinite(hessian.diagonal()).all()):
            raise RunFailed(f"{name}.{linear}", "activations that are not finite", "finite ones",
                            "Check the model's weights and the calibration text.")  # fmt: skip
        mirror_upper(hessian.div_(rows))
        return hessian

    def _quantize(
        self, name: str, layer: nn.Module, subset: list[str], hessian: Tensor | None, writer: FolderWriter
    ) -> float:
        """Quantize Linears of one input as one weight (rows are independent), write them, and put Ŵ into the layer.

        Returns the relative error.
        """
        names = [f"{name}.{linear}" for linear in subset]
        weights = [finite_weight(self.folder, full, self.device).float() for full in names]
        sizes = [len(weight) for weight in weights]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        del weights
        method = rtn if hessian is None else gptq
        result = method.quantize_weight(weight, self.config, hessian)
        restored = result.dequantize()
        start = 0
        for full, linear, size in zip(names, subset, sizes, strict=True):
            rows = slice(start, start + size)
            start = rows.stop
            write_linear(writer, full, rows, result, self.config)
            if hessian is not None:
                layer.get_submodule(linear).weight.copy_(restored[rows])
        return relative_error(weight, restored, hessian)


def finite_weight(folder: Folder, name: str, device: torch.device) -> Tensor:
    """The weight of the Linear `name` on `device`, as it is stored. Raises BadInput for infinities and NaN."""
    weight = folder.read(f"{name}.weight").to(device)
    if not bool(torch.isfinite(weight).all()):
        raise BadInput(f"{folder.path}, {name}.weight", "infinities or NaN", "finite weights")
    return weight


def _subsets(layer: nn.Module, hidden: Tensor, kwargs: dict) -> list[list[str]]:
    """The layer's Linears in call order, those that are given the very same tensor together."""
    inputs: list[Tensor] = []
    subsets: list[list[str]] = []
    handles = []
    for name in linears(layer):

        def see(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            for known, subset in zip(inputs, subsets, strict=True):
                if known is args[0]:
                    subset.append(name)
                    return
            inputs.append(args[0])
            subsets.append([name])

        handles.append(layer.get_submodule(name).register_forward_pre_hook(see))
    run_layer(layer, hidden, kwargs)
    for handle in handles:
        handle.remove()
    return subsets


def relative_error(weight: Tensor, restored: Tensor, hessian: Tensor | None) -> float:
    """‖(Ŵ - W)X‖/‖WX‖ with hessian XᵀX, ‖Ŵ - W‖/‖W‖ without. Overwrites `restored`."""
    error = restored.sub_(weight)
    if hessian is None:
        return float(error.norm() / weight.norm().clamp(min=1e-30))
    lost, whole = (float((m @ hessian).mul_(m).sum()) for m in (error, weight))
    return (max(lost, 0.0) / max(whole, 1e-30)) ** 0.5


def write_linear(writer: FolderWriter, name: str, rows: slice, result: Quantized, config: GptqConfig) -> None:
    """Queue qweight, qzeros, scales and g_idx of the Linear made of some rows of a quantized weight."""
    writer.add(f"{name}.qweight", pack_codes(result.codes[rows], config.bits).t().contiguous())
    writer.add(f"{name}.qzeros", pack_zeros(result.zeros[rows].t().contiguous(), config, name))
    writer.add(f"{name}.scales", result.scales[rows].t().half())
    writer.add(f"{name}.g_idx", result.g_idx)


def read_linear(writer: LayerWriter, name: str, rows: int, cols: int, config: GptqConfig, device: torch.device) -> Quantized:
    """What `write_linear` was given for one Linear of a layer that is done, bit for bit."""
    codes = unpack_codes(writer.read(f"{name}.qweight").t().contiguous(), config.bits, cols)
    zeros = unpack_zeros(writer.read(f"{name}.qzeros"), config, rows).t()
    scales, g_idx = writer.read(f"{name}.scales").t().float(), writer.read(f"{name}.g_idx")
    return Quantized(codes.to(device), scales.to(device), zeros.to(device), g_idx.to(device))
