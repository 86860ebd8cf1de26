"""The quantized checkpoints that qzo reads and writes: one module per format, found by quant_method.

A module has: VERSIONS, the names under --format that it writes; PARTS, the tensors of a Linear, among them CODES and SCALES;
and the functions of `Format`. A further format is such a module and a line of the table.
"""

from typing import Protocol

import torch

from qzo.errors import BadInput
from qzo.model import awq_format, compressed_format, gptq_format
from qzo.model.files import Folder
from qzo.model.uniform import LayerTensors, Moved, Quantization, raw_config


class Format(Protocol):
    """One module; see the functions' docstrings in gptq_format."""

    VERSIONS: tuple[str, ...]
    PARTS: tuple[str, ...]
    CODES: str
    SCALES: str

    def read_config(self, folder: Folder) -> Quantization | None: ...
    def shape(self, folder: Folder, name: str, config: Quantization) -> tuple[int, int]: ...
    def read_layer(
        self, folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = ...
    ) -> LayerTensors: ...
    def stored_scales(self, folder: Folder, name: str) -> torch.Tensor: ...
    def scale_dtype(self, folder: Folder, name: str) -> torch.dtype: ...
    def written(
        self, folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved
    ) -> torch.Tensor: ...
    def documents(self, folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]: ...


FORMATS: dict[str, Format] = {"gptq": gptq_format, "awq": awq_format, "compressed-tensors": compressed_format}


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for a format not understood, by name."""
    found = raw_config(folder)
    return None if found is None else _by_method(*found).read_config(folder)


def _by_method(raw: dict, where: str) -> Format:
    method = raw.get("quant_method", "gptq")
    if not isinstance(method, str) or method not in FORMATS:
        raise BadInput(where, f"format {method!r}", f"one of {', '.join(FORMATS)}")
    return FORMATS[method]


def format_of(config: Quantization) -> Format:
    return next(module for module in FORMATS.values() if config.version in module.VERSIONS)


def part_of(folder: Folder, tensor: str, config: Quantization) -> tuple[str, str] | None:
    """(module, part) of a stored tensor of a quantized Linear, None for any other."""
    layout = format_of(config)
    module, _, part = tensor.rpartition(".")
    return (module, part) if part in layout.PARTS and f"{module}.{layout.CODES}" in folder else None


def is_quantized(folder: Folder, name: str, config: Quantization) -> bool:
    return f"{name}.{format_of(config).CODES}" in folder


def stored_scales(folder: Folder, name: str, config: Quantization) -> torch.Tensor:
    """Scales [N, G] of the Linear `name` in the file's dtype."""
    return format_of(config).stored_scales(folder, name)
