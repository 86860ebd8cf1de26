"""A packed checkpoint of ZeroQAT on disk, as it is served: quant_method "qzo_packed", version 1, bits, group_size, activations, smoothing.

Per Linear(K -> N), of G groups: qweight int32 [ceil(K·f/32), N], qzeros int32 [G, ceil(N·f/32)] and scales fp32 [G, N], packed as GPTQ
version 2 packs codes of f bits; f is bits, but 8 for codes of 6. bias fp32 [N] where the Linear or its smoothing has one. span fp32 [1]
where activations are of 4, 6 or 8 bits; shift and divisor fp32 [K] where nobody before the Linear shifts and scales its input.
Norms are folded (model/qat.py), fp32; an RMSNorm may have a bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
from qzo_kernels.pack import pack_codes
from torch import Tensor, nn

from qzo.errors import BadInput
from qzo.model import gptq_format
from qzo.model.files import Folder
from qzo.model.packing import Packed, field
from qzo.model.qat import FoldedNorm, quantize_operands
from qzo.model.smoothing import places
from qzo.model.uniform import CPU, InputGrid, LayerTensors, Moved, Quantization, exact_tensor, raw_config
from qzo.model.zeroqat_format import LatentConfig, checked

METHOD, VERSION = "qzo_packed", 1
VERSIONS = ("packed",)
CODES, SCALES = "qweight", "scales"
_GRID = ("span", "shift", "divisor")
PARTS = (CODES, SCALES, "qzeros", *_GRID)


@dataclass(frozen=True)
class PackedConfig(Quantization):
    """`bits` is the width of the fields, `width` that of the codes in them."""

    sym: bool = False
    version: str = "packed"
    width: int = 0
    activations: int = 16
    smoothing: bool = False

    v2 = True  # for gptq_format: zero points are stored plainly


def document(config: LatentConfig) -> dict[str, Any]:
    """config.json's quantization_config for what a latent checkpoint is packed to."""
    return {**config.to_dict(), "quant_method": METHOD, "version": VERSION}


def read_config(folder: Folder) -> PackedConfig | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for newer versions and wrong values."""
    found = raw_config(folder)
    if found is None:
        return None
    bits, size, activations, smoothing = checked(*found, VERSION)
    return PackedConfig(field(bits), size, width=bits, activations=activations, smoothing=smoothing)


def write_linear(found: Packed, bits: int) -> dict[str, Tensor]:
    """The tensors of a Linear of `bits`, by the last part of their names."""
    width = field(bits)
    parts = {"qweight": pack_codes(found.codes, width).t().contiguous(), "qzeros": pack_codes(found.zero.t().contiguous(), width), "scales": found.step.t()}
    return parts | {key: value for key, value in found.parts().items() if key in ("bias", *_GRID)}


def read_layer(folder: Folder, name: str, config: PackedConfig, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows), unpacked on `device`. Raises BadInput for wrong shapes, dtypes and values."""
    tensors = gptq_format.read_layer(folder, name, config, rows, cols, device)
    wanted = {"span": (1,)} if config.activations < 16 else {}
    if any(f"{name}.{key}" in folder for key in ("shift", "divisor")):
        wanted |= {"shift": (cols,), "divisor": (cols,)}
    grid = InputGrid(config.activations)
    for key, shape in wanted.items():
        value = exact_tensor(folder, f"{name}.{key}", shape, torch.float32).to(device, copy=True)
        if not bool(value.isfinite().all()) or key != "shift" and not bool((value > 0).all()):
            raise BadInput(f"{folder.path}, {name}.{key}", "values that no input grid has", "finite numbers, positive for span and divisor")
        setattr(grid, key, value)
    tensors.grid = grid
    return tensors


shape, stored_scales = gptq_format.shape, gptq_format.stored_scales


def rounded(folder: Folder, name: str, scales: Tensor) -> Tensor:
    """Scales [N, G] as an export holds them: as they are."""
    return scales


def written(folder: Folder, name: str, part: str, config: PackedConfig, version: str, moved: Moved) -> Tensor:
    """The tensor `name.part` of an export."""
    return folder.read(f"{name}.{part}") if part in _GRID else gptq_format.written(folder, name, part, config, config.version, moved)


def documents(folder: Folder, config: PackedConfig, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, no further JSON files)."""
    return {**folder.config["quantization_config"]}, {}


def prepare_model(model: nn.Module, folder: Folder, config: PackedConfig) -> None:
    """Before the tensors of a model on meta are read: attention that rounds q, k and v, and a bias for the norms that δ is folded into.

    Raises BadInput for a Linear that lacks the shift of its input.
    """
    if config.activations < 16:
        quantize_operands(model)
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for number, layer in enumerate(layers):
        layer.self_attn.operand_bits = config.activations
        for place in places(layer).values() if config.smoothing else ():
            for name in place.makers if place.site.shift is not None else ():
                module = layer.get_submodule(name)
                if getattr(module, "bias", None) is None and not isinstance(module, nn.Linear):
                    norm = FoldedNorm(module, None)
                    norm.bias = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
                    layer.set_submodule(name, norm)
            for name in () if place.makers else place.readers:
                if f"{prefix}.{number}.{name}.shift" not in folder:
                    raise BadInput(str(folder.path), f"no tensor {prefix}.{number}.{name}.shift", "every tensor of the model", "The checkpoint is incomplete.")
