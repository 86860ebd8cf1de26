"""4-bit checkpoints of bitsandbytes on disk, NF4 and FP4 (arXiv 2305.14314), as transformers saves them.

Per Linear(K -> N), everything below `weight`: the codes row after row, two to a byte, the first in the high bits (uint8
[N·K/2, 1], or the same bytes under another dtype); absmax fp32 [N·K/B], one per block of B codes; quant_map fp32 [16], the levels;
quant_state.bitsandbytes__nf4 (or fp4), JSON as uint8. W[n, k] = absmax[(n·K + k) // B]·quant_map[code]: a codebook in place of
(code - zero). B must divide K: a block then is of one row, and absmax [N, K/B] are the scales.

Double quantization: absmax uint8, nested_absmax fp32, nested_quant_map fp32 [256], and in the JSON nested_blocksize and
nested_offset; absmax = nested_quant_map[byte]·nested_absmax[block] + nested_offset. Scales that move are fp32, and an export
writes them so: without the nested tensors, 4 bytes per block in place of 1.
"""

import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from qzo.errors import BadInput
from qzo.model.files import Folder, one_line
from qzo.model.uniform import CPU, LayerTensors, Moved, Quantization, empty_codes, exact_tensor, fill_codes, finite_scales, raw_config

VERSIONS = ("bitsandbytes-4bit",)
CODES, SCALES = "weight", "weight.absmax"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STATE = "weight.quant_state.bitsandbytes__"
# The readers know these by name, whatever a file's quant_map says; NF4: appendix E of the paper.
LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
STATES = tuple(_STATE + kind for kind in LEVELS)
PARTS = (CODES, SCALES, "weight.quant_map", *_NESTED, *STATES)


@dataclass(frozen=True)
class State:
    """What the JSON of a Linear says; kind: nf4 or fp4; nested: (block size, offset) of the second quantization."""

    kind: str
    block: int
    shape: tuple[int, int]
    nested: tuple[int, float] | None


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized; the block size is that of its first Linear."""
    if raw_config(folder) is None:
        return None
    first = next((tensor.removesuffix(f".{state}") for tensor in folder.tensors for state in STATES if tensor.endswith(f".{state}")), None)
    return Quantization(4, 64 if first is None else _state(folder, first).block, version=VERSIONS[0], codebook=True)


def _state(folder: Folder, name: str) -> State:
    """Raises BadInput where the JSON is missing, damaged, or says what is not understood."""
    found = [kind for kind in LEVELS if f"{name}.{_STATE}{kind}" in folder]
    if len(found) != 1:
        given = " and ".join(found) or "no quant_state of nf4 or fp4"
        raise BadInput(f"{folder.path}, {name}", given, f"one tensor {_STATE}nf4 or fp4", "The checkpoint is incomplete.")
    where = f"{folder.path}, {name}.{_STATE}{found[0]}"
    stored = folder.read(f"{name}.{_STATE}{found[0]}")
    if stored.dtype != torch.uint8 or stored.numel() > 4096:
        raise BadInput(where, f"{stored.dtype} of {stored.numel()}", "the bytes of a short JSON text, uint8")
    try:
        raw = json.loads(bytes(stored.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"cannot be read ({one_line(error)})", "JSON", "The checkpoint is damaged.") from error
    if not isinstance(raw, dict):
        raise BadInput(where, type(raw).__name__, "a JSON object")
    return _checked(raw, found[0], f"{name}.{_NESTED[0]}" in folder, where)


def _checked(raw: dict[str, Any], kind: str, nested: bool, where: str) -> State:
    size, dims, outer, offset = (raw.get(key) for key in ("blocksize", "shape", "nested_blocksize", "nested_offset"))
    known = [
        ("quant_type", raw.get("quant_type") == kind, repr(kind)), ("blocksize", _positive(size), "a positive whole number"),
        ("shape", isinstance(dims, list) and len(dims) == 2 and all(map(_positive, dims)), "two positive whole numbers"),
        ("nested_blocksize", not nested or _positive(outer), "a positive whole number"),
        ("nested_offset", not nested or (type(offset) in (int, float) and abs(offset) < 1e30), "a number"),
    ]  # fmt: skip
    for key, right, expected in known:
        if not right:
            raise BadInput(where, f"{key} {raw.get(key)!r:.80}", expected)
    return State(kind, size, tuple(dims), (outer, offset) if nested else None)


def _positive(value: object) -> bool:
    return type(value) is int and value > 0


def shape(folder: Folder, name: str, config: Quantization) -> tuple[int, int]:
    """[N, K] of the Linear `name`."""
    return _state(folder, name).shape


def _codebook(folder: Folder, name: str, kind: str) -> torch.Tensor:
    """fp32 [16]. Raises BadInput for levels that a reader would not use."""
    levels = exact_tensor(folder, f"{name}.weight.quant_map", (16,), torch.float32)
    if not torch.allclose(levels, torch.tensor(LEVELS[kind]), rtol=0, atol=1e-6):
        raise BadInput(f"{folder.path}, {name}.weight.quant_map", f"other levels than those of {kind}", f"those of {kind}, which readers use")
    return levels


def read_layer(folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, on `device`. Raises BadInput for wrong shapes, for blocks that cross rows,
    and for another block size than `config` has."""
    state = _state(folder, name)
    where = f"{folder.path}, {name}.{_STATE}{state.kind}"
    if state.shape != (rows, cols):
        raise BadInput(where, f"shape {list(state.shape)}", f"{[rows, cols]}, as config.json says")
    if cols % state.block:
        raise BadInput(where, f"blocksize {state.block} with rows of {cols}: blocks that cross rows", "a blocksize that divides each row",
                       "Quantize it again with a smaller one.")  # fmt: skip
    if state.block != config.group_size:
        raise BadInput(where, f"blocksize {state.block}", f"{config.group_size}, as other Linears have it")
    codes = empty_codes(rows, cols, 4, device)
    # A copy: scales move in place, and what is read again would have moved with them.
    scales = finite_scales(stored_scales(folder, name).to(device, copy=True), f"{folder.path}, {name}.{SCALES}")
    codebook = _codebook(folder, name, state.kind).to(device)
    packed = folder.read(f"{name}.{CODES}")
    size = packed.numel() * packed.dtype.itemsize
    if 2 * size != rows * cols:
        raise BadInput(f"{folder.path}, {name}.{CODES}", f"{size} bytes", f"{rows * cols // 2}, for {rows}×{cols} codes of 4 bits")
    packed = packed.flatten().view(torch.uint8).view(rows, cols // 2).to(device)
    fill_codes(codes, 4, lambda start, end: unpack(packed[start:end]), None)
    return LayerTensors(codes, scales, None, None, codebook)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [R, K/2] -> codes uint8 [R, K]."""
    return torch.stack((packed >> 4, packed & 15), 2).flatten(1)


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """fp32 [N, K/B], double quantization undone. Raises BadInput for wrong shapes."""
    state = _state(folder, name)
    rows, cols = state.shape
    blocks = rows * cols // state.block
    if state.nested is None:
        return exact_tensor(folder, f"{name}.{SCALES}", (blocks,), torch.float32).view(rows, -1)
    size, offset = state.nested
    inner = exact_tensor(folder, f"{name}.{SCALES}", (blocks,), torch.uint8)
    outer = exact_tensor(folder, f"{name}.{_NESTED[0]}", (-(-blocks // size),), torch.float32)
    levels = exact_tensor(folder, f"{name}.{_NESTED[1]}", (256,), torch.float32)
    # In this order, each rounded to fp32: the bits that bitsandbytes has.
    absmax = levels[inner.int()] * outer[torch.arange(blocks) // size] + torch.tensor(offset, dtype=torch.float32)
    return absmax.view(rows, -1)


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales [N, K/B] as an export holds them: fp32, as they are."""
    return scales


def written(folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved) -> torch.Tensor | None:
    """The tensor `name.part` of an export; None: it has no such tensor. Raises BadInput for codes that moved."""
    if moved.codes is not None:
        raise BadInput(f"{folder.path}, {name}", "4-bit codes that moved", "scales that did")
    if part == SCALES:
        return (stored_scales(folder, name) if moved.scales is None else moved.scales).flatten()
    if part in _NESTED:
        return None
    stored = folder.read(f"{name}.{part}")
    if part in STATES and f"{name}.{_NESTED[0]}" in folder:
        raw = json.loads(bytes(stored.tolist()))
        plain = json.dumps({key: value for key, value in raw.items() if not key.startswith("nested_")})
        return torch.tensor(list(plain.encode("utf-8")), dtype=torch.uint8)
    return stored


def documents(folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name). Warns where it is larger than the base: see above."""
    raw = raw_config(folder)[0]
    if any(tensor.endswith(_NESTED[0]) for tensor in folder.tensors):
        warnings.warn(f"{folder.path}: its absmax is quantized twice (bnb_4bit_use_double_quant); the export holds the tuned one in fp32, "
                      f"{24 / config.group_size:.2g} bits more per weight", stacklevel=2)  # fmt: skip
        raw = {**raw, "bnb_4bit_use_double_quant": False}
    return raw, {}
