"""GPTQ checkpoints on disk: qweight, qzeros, scales, g_idx of one Linear, versions 1 and 2.

Per Linear(K -> N): qweight int32 [ceil(K·bits/32), N], qzeros int32 [G, ceil(N·bits/32)], scales fp16 [G, N],
g_idx int32 [K]; W[k, n] = scales[g_idx[k], n]·(q - z). Version 1 stores z - 1, version 2 stores z.
"""

import dataclasses
from dataclasses import dataclass

import torch
from qzo_kernels.pack import pack_codes, packed_words, unpack_codes

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.uniform import (
    CPU, LayerTensors, Moved, Quantization, check_bits, check_group_size, empty_codes, fill_codes, finite_scales, in_order, permutation, plain_zeros,
    raw_config, read_tensor,
)  # fmt: skip

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
CODES, SCALES = "qweight", "scales"
PARTS = (CODES, SCALES, "qzeros", "g_idx")
# Version 1 subtracted 1 from every lane at once: undone on the whole word, so that borrows run back too.
_ONE_PER_LANE = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class GptqConfig(Quantization):
    """What quantize_config.json says."""

    version: str = "gptq"

    @property
    def v2(self) -> bool:
        return self.version == "gptq_v2"

    def to_dict(self) -> dict:
        """The keys that GPTQ readers look for."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
            "desc_act": self.desc_act, "checkpoint_format": self.version, "pack_dtype": "int32", "lm_head": False,
        }  # fmt: skip


def read_config(folder: Folder) -> GptqConfig | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for a format not understood."""
    found = raw_config(folder)
    if found is None:
        return None
    raw, where = found
    raw = {_SYNONYMS.get(key, key): value for key, value in raw.items()}
    method = raw.get("quant_method", "gptq")
    version = raw.get("checkpoint_format") or raw.get("format") or ("gptq_v2" if raw.get("version") == 2 else "gptq")
    if method != "gptq" or version not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        given = method if method != "gptq" else ("marlin" if raw.get("is_marlin_format") else version)
        raise BadInput(where, f"format {given!r}", "a GPTQ checkpoint: checkpoint_format gptq or gptq_v2")
    if raw.get("pack_dtype", "int32") != "int32":
        raise BadInput(where, f"pack_dtype {raw['pack_dtype']!r}", "int32")
    if raw.get("dynamic"):
        raise BadInput(where, "dynamic (another quantization per module)", "one for all modules")
    bits, group_size = raw.get("bits"), raw.get("group_size")
    check_bits(where, bits, BITS, "2, 3, 4 or 8")
    check_group_size(where, group_size)
    return GptqConfig(bits, group_size, bool(raw.get("sym", True)), bool(raw.get("desc_act", False)), version)


def shape(folder: Folder, name: str, config: GptqConfig) -> tuple[int, int]:
    """[N, K] of the Linear `name`; K as its words hold it, up to the rest of the last one."""
    words, rows = folder.shape(f"{name}.{CODES}")
    return rows, words * 32 // config.bits


def unpack_zeros(qzeros: torch.Tensor, config: GptqConfig, rows: int) -> torch.Tensor:
    """qzeros int32 [G, words] -> zero points uint8 [G, rows]."""
    if not config.v2 and config.bits != 3:
        one = torch.tensor(_ONE_PER_LANE[config.bits], dtype=torch.int32, device=qzeros.device)
        qzeros = qzeros + one
    zeros = unpack_codes(qzeros.contiguous(), config.bits, rows)
    return (zeros + 1) & 7 if not config.v2 and config.bits == 3 else zeros


def pack_zeros(zeros: torch.Tensor, config: GptqConfig, where: str) -> torch.Tensor:
    """Zero points uint8 [G, N] -> qzeros int32. A zero of 0 in version 1 is refused: readers disagree about it."""
    if not config.v2:
        if bool((zeros == 0).any()):
            raise BadInput(where, "a zero point of 0 in format gptq (v1), which readers decode differently",
                           "a format that stores it plainly", "Use --format gptq_v2.")  # fmt: skip
        zeros = zeros - 1
    return pack_codes(zeros.contiguous(), config.bits)


def stored_scales(folder: Folder, name: str) -> torch.Tensor:
    """[N, G], in the file's dtype."""
    return folder.read(f"{name}.{SCALES}").t()


def rounded(folder: Folder, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] as an export holds them: in fp16."""
    return scales.to(torch.float16)


def written(folder: Folder, name: str, part: str, config: GptqConfig, version: str, moved: Moved) -> torch.Tensor:
    """The tensor `name.part` of an export as `version`. Raises BadInput as pack_zeros does."""
    if part == SCALES and moved.scales is not None:
        return moved.scales.t()
    if part == CODES and moved.codes is not None:
        cols = moved.codes.shape[1]
        perm = permutation(folder, f"{name}.g_idx", cols, config.group(cols))
        return pack_codes(in_order(moved.codes, perm), config.bits).t().contiguous()
    value = folder.read(f"{name}.{part}")
    if part == "qzeros" and version != config.version:
        target = dataclasses.replace(config, version=version)
        value = pack_zeros(unpack_zeros(value, config, folder.shape(f"{name}.{SCALES}")[1]), target, f"{name}.{part}")
    return value


def documents(folder: Folder, config: GptqConfig, version: str) -> tuple[dict, dict[str, dict]]:
    """(quantization_config of an export, further JSON files by name)."""
    target = dataclasses.replace(config, version=version)
    raw = folder.config.get("quantization_config") or folder.read_json("quantize_config.json")
    raw = {**target.to_dict(), **raw, "checkpoint_format": version}
    raw.update({key: value for key, value in (("format", version), ("version", 1 + target.v2)) if key in raw})
    return raw, {"quantize_config.json": raw}


def read_layer(folder: Folder, name: str, config: GptqConfig, rows: int, cols: int, device: torch.device = CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, unpacked on `device`. Raises BadInput for wrong shapes."""
    size, bits = config.group(cols), config.bits
    groups = -(-cols // size)
    # What stays is made before what goes: freed memory below it could not be given back.
    codes = empty_codes(rows, cols, bits, device)
    scales = read_tensor(folder, name, SCALES, (groups, rows), scales=True).to(device).t()
    scales = finite_scales(scales, f"{folder.path}, {name}.{SCALES}")
    zeros = read_tensor(folder, name, "qzeros", (groups, packed_words(rows, bits))).to(device)
    zeros = plain_zeros(unpack_zeros(zeros, config, rows).t(), bits)
    perm = permutation(folder, f"{name}.g_idx", cols, size)
    perm = None if perm is None else perm.to(device)
    packed = read_tensor(folder, name, CODES, (packed_words(cols, bits), rows)).to(device)
    fill_codes(codes, bits, lambda start, end: unpack_codes(packed[:, start:end].t().contiguous(), bits, cols), perm)
    return LayerTensors(codes, scales, zeros, perm)
