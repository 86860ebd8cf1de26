"""AWQ checkpoints on disk, the layout `gemm`: qweight, qzeros, scales of one Linear, 4 bits (arXiv 2306.00978; autoawq).

Per Linear(K -> N): qweight int32 [K, N/8], qzeros int32 [G, N/8], scales fp16 [G, N]; W[k, n] = scales[k // g, n]·(q - z).
Both are packed along N: field i of a word (bits 4i … 4i + 3) holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight. z is stored plainly.
"""

import torch
from qzo_kernels.pack import pack_codes, unpack_codes

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.uniform import (
    CPU, LayerTensors, Moved, Quantization, check_bits, check_group_size, empty_codes, fill_codes, finite_scales, plain_zeros, raw_config,
    read_tensor,
)  # fmt: skip

VERSIONS = ("awq",)
CODES, SCALES = "qweight", "scales"
PARTS = (CODES, SCALES, "qzeros")
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for a layout not understood."""
    found = raw_config(folder)
    if found is None:
        return None
    raw, where = found
    raw = {_SYNONYMS.get(key, key): value for key, value in raw.items()}
    layout = raw.get("version") or raw.get("format") or raw.get("checkpoint_format") or "gemm"
    if str(layout).lower() != "gemm":
        raise BadInput(where, f"AWQ in the layout {layout!r}", "gemm", "Quantize with version gemm, or convert it with autoawq.")
    check_bits(where, raw.get("bits"), (4,), "4, the only width of AWQ gemm")
    check_group_size(where, raw.get("group_size"))
    return Quantization(4, raw["group_size"], not raw.get("zero_point", True), version="awq")


def shape(folder: Folder, name: str, config: Quantization) -> tuple[int, int]:
    """[N, K] of the Linear `name`."""
    cols, words = folder.shape(f"{name}.{CODES}")
    return words * 8, cols


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, W] -> uint8 [8·W, R], rows in the order of the model's columns."""
    fields = unpack_codes(words.contiguous(), 4, 8 * words.shape[1]).view(len(words), -1, 2, 4)
    # Column 2i + j lies in field 4j + i.
    return fields.permute(1, 3, 2, 0).reshape(-1, len(words))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [8·W, R] -> int32 [R, W]: the inverse of `unpack`."""
    fields = codes.view(-1, 4, 2, codes.shape[1]).permute(3, 0, 2, 1)
    return pack_codes(fields.reshape(codes.shape[1], -1), 4)


def read_layer(folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, unpacked on `device`. Raises BadInput for wrong shapes."""
    if rows % 8:
        raise BadInput(f"{folder.path}, {name}.{CODES}", f"{rows} output channels", "a multiple of 8, as AWQ packs them")
    groups = -(-cols // config.group(cols))
    codes = empty_codes(rows, cols, 4, device)
    scales = read_tensor(folder, name, SCALES, (groups, rows), scales=True).to(device).t()
    scales = finite_scales(scales, f"{folder.path}, {name}.{SCALES}")
    zeros = plain_zeros(unpack(read_tensor(folder, name, "qzeros", (groups, rows // 8)).to(device)), 4)
    packed = read_tensor(folder, name, CODES, (cols, rows // 8)).to(device)
    # Starts are multiples of 64: words of eight rows are never split.
    fill_codes(codes, 4, lambda start, end: unpack(packed[:, start // 8 : end // 8]), None)
    return LayerTensors(codes, scales, zeros, None)


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """[N, G], in the file's dtype."""
    return folder.read(f"{name}.{SCALES}").t()


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] as an export holds them: in the dtype of the base's."""
    return scales.to(folder.read(f"{name}.{SCALES}").dtype)


def written(folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved) -> torch.Tensor:
    """The tensor `name.part` of an export."""
    if part == SCALES and moved.scales is not None:
        return moved.scales.t()
    if part == CODES and moved.codes is not None:
        return pack(moved.codes)
    return folder.read(f"{name}.{part}")


def documents(folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name)."""
    beside = "quantize_config.json"
    return raw_config(folder)[0], {beside: folder.read_json(beside)} if (folder.path / beside).exists() else {}
