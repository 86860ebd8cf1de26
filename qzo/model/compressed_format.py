"""compressed-tensors checkpoints on disk, the layout `pack-quantized`: what llm-compressor writes for W4A16 and W8A16.

Per Linear(K -> N): weight_packed int32 [N, ceil(K·bits/32)], weight_scale [N, G], weight_shape [2] = (N, K), where asymmetric
weight_zero_point int32 [ceil(N·bits/32), G], where reordered weight_g_idx int32 [K];
W[n, k] = weight_scale[n, g]·(q - z). q and z are signed and stored plus 2**(bits - 1): what is stored differs by the same,
and a symmetric layer (z = 0) reads as a zero of 2**(bits - 1).
"""

import torch
from qzo_kernels.pack import pack_codes, packed_words, unpack_codes

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.uniform import (
    CPU, LayerTensors, Moved, Quantization, check_bits, check_group_size, empty_codes, fill_codes, finite_scales, in_order, permutation, plain_zeros,
    raw_config, read_tensor,
)  # fmt: skip

VERSIONS = ("compressed-tensors",)
CODES, SCALES = "weight_packed", "weight_scale"
PARTS = (CODES, SCALES, "weight_shape", "weight_zero_point", "weight_g_idx")
LAYOUT = "pack-quantized"


def read_config(folder: Folder) -> Quantization | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput, by name, for what is not understood."""
    found = raw_config(folder)
    if found is None:
        return None
    raw, where = found
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        given = sorted(groups) if isinstance(groups, dict) else groups
        raise BadInput(where, f"config_groups {given!r}", "one group, an object, for all modules")
    label, group = next(iter(groups.items()))
    layout = group.get("format") or raw.get("format")
    if layout != LAYOUT:
        raise BadInput(where, f"compressed-tensors in the layout {layout!r}", LAYOUT)
    where = f"{where}, {label}"
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise BadInput(where, f"{key}: quantized activations", "null: weights only")
    for key in ("kv_cache_scheme", "transform_config"):
        if raw.get(key):
            raise BadInput(where, f"{key}: a model that computes in another way", "none")
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise BadInput(where, "sparsity_config: weights that are packed as sparse", "none")
    if group.get("targets") != ["Linear"]:
        raise BadInput(where, f"targets {group.get('targets')!r}", "['Linear']", "Leave modules out by `ignore`.")
    return _weights(group.get("weights"), f"{where}, weights")


def _weights(weights: object, where: str) -> Quantization:
    if not isinstance(weights, dict):
        raise BadInput(where, type(weights).__name__, "an object")
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    if strategy not in ("group", "channel"):
        raise BadInput(where, f"strategy {strategy!r}", "group or channel")
    if weights.get("type", "int") != "int":
        raise BadInput(where, f"type {weights['type']!r}", "int")
    if weights.get("dynamic"):
        raise BadInput(where, f"dynamic {weights['dynamic']!r}", "false: scales that are stored")
    check_bits(where, weights.get("num_bits"), (4, 8), "4 or 8")
    size = weights.get("group_size") if strategy == "group" else -1
    check_group_size(where, size)
    reordered = weights.get("actorder") in ("group", "dynamic", True)
    return Quantization(weights["num_bits"], size, bool(weights.get("symmetric", True)), reordered, "compressed-tensors")


def shape(folder: Folder, name: str, config: Quantization) -> tuple[int, int]:
    """[N, K] of the Linear `name`; K as its words hold it, up to the rest of the last one."""
    rows, words = folder.shape(f"{name}.{CODES}")
    return rows, words * 32 // config.bits


def read_layer(folder: Folder, name: str, config: Quantization, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, unpacked on `device`. Raises BadInput for wrong shapes."""
    size, bits = config.group(cols), config.bits
    groups = -(-cols // size)
    stored = folder.read(f"{name}.weight_shape").tolist()
    if stored != [rows, cols]:
        raise BadInput(f"{folder.path}, {name}.weight_shape", f"{stored}", f"{[rows, cols]}, as config.json says")
    codes = empty_codes(rows, cols, bits, device)
    scales = read_tensor(folder, name, SCALES, (rows, groups), scales=True).to(device)
    scales = finite_scales(scales, f"{folder.path}, {name}.{SCALES}")
    zeros = None
    if not config.sym:
        zeros = read_tensor(folder, name, "weight_zero_point", (packed_words(rows, bits), groups)).to(device)
        zeros = plain_zeros(unpack_codes(zeros.t().contiguous(), bits, rows).t(), bits)
    elif f"{name}.weight_zero_point" in folder:
        raise BadInput(f"{folder.path}, {name}.weight_zero_point", "zero points in a symmetric checkpoint", "none, or symmetric: false")
    perm = permutation(folder, f"{name}.weight_g_idx", cols, size)
    perm = None if perm is None else perm.to(device)
    packed = read_tensor(folder, name, CODES, (rows, packed_words(cols, bits))).to(device)
    fill_codes(codes, bits, lambda start, end: unpack_codes(packed[start:end], bits, cols), perm)
    return LayerTensors(codes, scales, zeros, perm)


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """[N, G], in the file's dtype."""
    return folder.read(f"{name}.{SCALES}")


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] as an export holds them: in the dtype of the base's."""
    return scales.to(folder.read(f"{name}.{SCALES}").dtype)


def written(folder: Folder, name: str, part: str, config: Quantization, version: str, moved: Moved) -> torch.Tensor:
    """The tensor `name.part` of an export."""
    if part == SCALES and moved.scales is not None:
        return moved.scales
    if part == CODES and moved.codes is not None:
        cols = moved.codes.shape[1]
        return pack_codes(in_order(moved.codes, permutation(folder, f"{name}.weight_g_idx", cols, config.group(cols))), config.bits)
    return folder.read(f"{name}.{part}")


def documents(folder: Folder, config: Quantization, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name)."""
    return raw_config(folder)[0], {}
