"""LLM.int8 checkpoints on disk (arXiv 2208.07339), as transformers writes them with bitsandbytes: 8 bits, one scale per row.

Per Linear(K -> N): weight int8 [N, K], SCB fp32 [N] (the largest absolute weight of a row), weight_format uint8 (0: row by row);
W[n, k] = weight[n, k]·SCB[n] / 127. Here scales are SCB / 127 in fp32, codes weight + 128, zeros 128.

Quotients by 127 are not all of fp32: about one scale in 128 lies between two of them. An export takes the nearest one, `rounded`;
an SCB whose scale did not move is written as it was. LLM.int8 also rounds activations, which is the reader's matter.
"""

import torch

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.uniform import CPU, LayerTensors, Moved, Quantization, empty_codes, exact_tensor, fill_codes, finite_scales, raw_config

VERSIONS = ("bitsandbytes-8bit",)
CODES, SCALES = "weight", "SCB"
PARTS = (CODES, SCALES, "weight_format")
TOP = 127


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized."""
    return None if raw_config(folder) is None else Quantization(8, -1, version=VERSIONS[0])


def shape(folder: Folder, name: str, config: Quantization) -> tuple[int, int]:
    """[N, K] of the Linear `name`."""
    rows, cols = folder.shape(f"{name}.{CODES}")
    return rows, cols


def read_layer(folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, on `device`. Raises BadInput for wrong shapes, and for tiled weights."""
    layout = f"{name}.weight_format"
    if layout in folder and (order := folder.read(layout).tolist()) != 0:
        raise BadInput(f"{folder.path}, {layout}", f"{order!r}, weights in the order of one GPU", "0: row by row",
                       "Load it with bitsandbytes 0.44 and save it again.")  # fmt: skip
    codes = empty_codes(rows, cols, 8, device)
    scales = exact_tensor(folder, f"{name}.{SCALES}", (rows,), torch.float32).to(device)
    scales = finite_scales(scales_of(scales)[:, None], f"{folder.path}, {name}.{SCALES}")
    weight = exact_tensor(folder, f"{name}.{CODES}", (rows, cols), torch.int8).to(device)
    fill_codes(codes, 8, lambda start, end: flipped(weight[start:end].view(torch.uint8)), None)
    return LayerTensors(codes, scales, None, None)


def flipped(codes: torch.Tensor) -> torch.Tensor:
    """uint8, 128 added modulo 256: signed to unsigned, and back."""
    return codes ^ 128


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """fp32 [N, 1]."""
    return scales_of(folder.read(f"{name}.{SCALES}"))[:, None]


def scales_of(scb: torch.Tensor) -> torch.Tensor:
    """fp32 SCB / 127, the same bits on every device: CUDA would multiply by the reciprocal of a Python number."""
    return scb.float() / torch.full((), TOP, dtype=torch.float32, device=scb.device)


def scb_of(scales: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """SCB fp32 [N] of scales [N, 1]: the stored one where a scale has not moved."""
    return torch.where(scales_of(stored) == scales[:, 0], stored, _nearest_scb(scales[:, 0]))


def _nearest_scb(scales: torch.Tensor) -> torch.Tensor:
    """fp32: of 127·scale and its two neighbours the one whose quotient by 127 is nearest."""
    best = scales * TOP
    for way in (float("-inf"), float("inf")):
        other = torch.nextafter(scales * TOP, torch.full_like(scales, way))
        best = torch.where((scales_of(other) - scales).abs() < (scales_of(best) - scales).abs(), other, best)
    return best


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales fp32 [N, 1] as a reader of the export will have them."""
    return scales_of(_nearest_scb(scales))


def written(folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved) -> torch.Tensor:
    """The tensor `name.part` of an export."""
    stored = folder.read(f"{name}.{part}")
    if part == SCALES and moved.scales is not None:
        return scb_of(moved.scales, stored)
    if part == CODES and moved.codes is not None:
        return flipped(moved.codes).view(torch.int8)
    return stored


def documents(folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name)."""
    return raw_config(folder)[0], {}
