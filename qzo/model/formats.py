"""The quantized checkpoints that qzo reads and writes: one module per format, found by quant_method.

A module has: VERSIONS, the names under --format that it writes; PARTS, the tensors of a Linear, among them CODES and SCALES;
and the functions of `Format`. A further format is such a module and a line of the table. A Linear that has any of the parts
is quantized, but for `weight`, which every Linear may have.
"""

from typing import Protocol

import torch

from qzo.errors import BadInput
from qzo.model import aqlm_format, awq_format, bnb4_format, bnb8_format, compressed_format, gptq_format, packed_format
from qzo.model.files import Folder
from qzo.model.uniform import LayerTensors, Moved, Quantization, raw_config
from qzo.model.zeroqat_format import latent_config


class Format(Protocol):
    """One module; see the functions' docstrings in gptq_format. `written` may say None: an export has no such tensor."""

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
    def rounded(self, folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor: ...
    def written(
        self, folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved
    ) -> torch.Tensor | None: ...
    def documents(self, folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]: ...


# bitsandbytes has two formats under one quant_method.
FORMATS: dict[str, Format] = {
    "gptq": gptq_format, "awq": awq_format, "compressed-tensors": compressed_format, "bitsandbytes-8bit": bnb8_format,
    "bitsandbytes-4bit": bnb4_format, "aqlm": aqlm_format, "qzo_packed": packed_format,
}  # fmt: skip
_METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "aqlm", "qzo_packed")


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where no Linear is: in a 16-bit folder, and in a latent checkpoint (zeroqat_format).

    Raises BadInput for a format not understood, by name.
    """
    found = raw_config(folder)
    return None if found is None or latent_config(folder) else _by_method(*found).read_config(folder)


def _by_method(raw: dict, where: str) -> Format:
    method = raw.get("quant_method", "gptq")
    if method not in _METHODS:
        raise BadInput(where, f"format {method!r}", f"one of {', '.join(_METHODS)}")
    if method != "bitsandbytes":
        return FORMATS[method]
    asked = [name for name in ("load_in_8bit", "load_in_4bit") if raw.get(name)]
    if len(asked) != 1:
        raise BadInput(where, f"bitsandbytes with {' and '.join(asked) or 'neither load_in_8bit nor load_in_4bit'}", "one of the two")
    return FORMATS[f"bitsandbytes-{asked[0].removeprefix('load_in_')}"]


def format_of(config: Quantization) -> Format:
    return next(module for module in FORMATS.values() if config.version in module.VERSIONS)


def part_of(folder: Folder, tensor: str, config: Quantization) -> tuple[str, str] | None:
    """(module, part) of a stored tensor of a quantized Linear, None for any other."""
    for part in format_of(config).PARTS:
        module = tensor.removesuffix(f".{part}")
        if module != tensor and is_quantized(folder, module, config):
            return module, part
    return None


def is_quantized(folder: Folder, name: str, config: Quantization) -> bool:
    return any(f"{name}.{part}" in folder for part in format_of(config).PARTS if part != "weight")


def stored_scales(folder: Folder, name: str, config: Quantization) -> torch.Tensor:
    """Scales [N, G] of the Linear `name` in the file's dtype."""
    return format_of(config).stored_scales(folder, name)
