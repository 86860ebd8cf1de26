"""AQLM checkpoints on disk (arXiv 2401.06118), as transformers reads them with aqlm: 2 bits, one code for 8 columns of a row.

Per Linear(K -> N): codes [N, K/8, C] int16 (C = 1, 65,536 vectors: 1x16) or int8 (C = 2, 256 vectors: 2x8), both unsigned in two's
complement; codebooks [C, vectors, 1, 8]; scales [N, 1, 1, 1]; W[n, 8g + j] = scales[n]·Σ_c codebooks[c, codes[n, g, c], 0, j]
(qzo_kernels.reference_vectors). Only the scales can move: codes of vectors have no neighbours.
"""

import torch
from qzo_kernels.reference_vectors import WIDTH, vector_words

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.uniform import CPU, LayerTensors, Moved, Quantization, exact_tensor, finite_scales, raw_config

VERSIONS = ("aqlm",)
CODES, SCALES = "codes", "scales"
PARTS = (CODES, "codebooks", SCALES)
_CODE = {256: torch.int8, 65536: torch.int16}
_DEFAULTS = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}
_KNOWN = {(1, 16, WIDTH, 1), (2, 8, WIDTH, 1)}
_SHAPES = {(1, 65536, 1, WIDTH), (2, 256, 1, WIDTH)}


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for other shapes of codes."""
    if (found := raw_config(folder)) is None:
        return None
    raw, where = found
    given = {key: raw.get(key, default) for key, default in _DEFAULTS.items()}
    if any(type(value) is not int for value in given.values()) or tuple(given.values()) not in _KNOWN:
        said = ", ".join(f"{key} {value!r}" for key, value in given.items())
        raise BadInput(where, said, "1 codebook of 16 bits or 2 of 8, in_group_size 8, out_group_size 1")
    return Quantization(2, -1, version=VERSIONS[0], codebook=True)


def shape(folder: Folder, name: str, config: Quantization) -> tuple[int, int]:
    """[N, K] of the Linear `name`."""
    rows, groups, _ = folder.shape(f"{name}.{CODES}")
    return rows, groups * WIDTH


def read_layer(folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, on `device`. Raises BadInput for wrong shapes."""
    where = f"{folder.path}, {name}.codebooks"
    books = folder.read(f"{name}.codebooks")
    if tuple(books.shape) not in _SHAPES or not books.is_floating_point():
        known = " or ".join(str(list(shape)) for shape in sorted(_SHAPES))
        raise BadInput(where, f"{books.dtype} of shape {list(books.shape)}", f"floating-point of shape {known}")
    if not bool(books.isfinite().all()):
        raise BadInput(where, "infinities or NaN", "finite vectors")
    count, size = books.shape[:2]
    codes = exact_tensor(folder, f"{name}.{CODES}", (rows, cols // WIDTH, count), _CODE[size])
    scales = finite_scales(stored_scales(folder, name).to(device), f"{folder.path}, {name}.{SCALES}")
    if tuple(scales.shape) != (rows, 1):
        raise BadInput(f"{folder.path}, {name}.{SCALES}", f"{scales.numel()} scales", f"{rows}, one of each row")
    words = torch.zeros(rows, vector_words(cols, count, size), dtype=torch.int32)
    words.view(codes.dtype)[:, : codes[0].numel()] = codes.flatten(1)
    return LayerTensors(words.to(device), scales, None, None, books.view(count, size, WIDTH).to(device, copy=True))


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """[N, 1] in the file's dtype."""
    return folder.read(f"{name}.{SCALES}").flatten()[:, None]


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales fp32 [N, 1] as an export holds them."""
    return scales.to(folder.read(f"{name}.{SCALES}").dtype)


def written(folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved) -> torch.Tensor:
    """The tensor `name.part` of an export."""
    stored = folder.read(f"{name}.{part}")
    return moved.scales.view(stored.shape) if part == SCALES and moved.scales is not None else stored


def documents(folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name)."""
    return raw_config(folder)[0], {}
