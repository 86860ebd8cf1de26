"""What decoder layers are given on calibration windows, and its second moments."""

from typing import Any

import torch
from torch import Tensor, nn

from qzo.model.files import Folder
from qzo.model.load import _computed_buffers, fill, release

TOKENS_AT_ONCE = 4096


class Seen(Exception):
    """Ends a forward as soon as it has produced what was asked for."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module name and the list of the decoder's layers."""
    layers = model.get_decoder().layers
    return next(name for name, module in model.named_modules() if module is layers), layers


def first_inputs(model: nn.Module, folder: Folder, windows: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[dict]]:
    """The first layer's inputs, on the CPU, some windows at a time; and every layer's keyword arguments."""
    decoder = model.get_decoder()
    prefix, layers = decoder_layers(model)
    parent = prefix.rpartition(".")[0]
    outside = [(f"{parent}.{name}.", child) for name, child in decoder.named_children() if child is not layers]
    for inside, _ in outside:
        fill(model, folder, device, dtype, inside)
    _computed_buffers(model, device)
    calls: list[tuple[Tensor, dict]] = []

    def record(hidden: Tensor, **kwargs: Any) -> Tensor:
        calls.append((hidden, kwargs))
        if len(calls) == len(layers):
            raise Seen
        return hidden

    def run(ids: Tensor) -> None:
        calls.clear()
        try:
            decoder(input_ids=ids.to(device), use_cache=False)
        except Seen:
            pass

    for layer in layers:
        layer.forward = record
    # Arguments of a single window broadcast over any number of them.
    run(windows[:1])
    kwargs = [call[1] for call in calls]
    hidden = []
    for part in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        run(part)
        hidden.append(calls[0][0].cpu())
    for layer in layers:
        del layer.forward
    for _, child in outside:
        release(child)
    return hidden, kwargs


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
    out = layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def add_second_moment(hessian: Tensor, x: Tensor) -> None:
    """Add the upper triangle of XᵀX, x fp32 [rows, K], in block rows (what lies below the diagonal is not defined)."""
    step = -(-x.shape[1] // 8)
    for a in range(0, x.shape[1], step):
        hessian[a : a + step, a:].addmm_(x[:, a : a + step].t(), x[:, a:])


def mirror_upper(matrix: Tensor) -> None:
    """Make a square matrix symmetric by its upper triangle, in place: a copy of K = 13824 is 0.76 GB."""
    step = -(-len(matrix) // 8)
    for a in range(0, len(matrix), step):
        b = min(a + step, len(matrix))
        matrix[a:b, a:b] = matrix[a:b, a:b].triu() + matrix[a:b, a:b].triu(1).t()
        matrix[b:, a:b] = matrix[a:b, b:].t()
