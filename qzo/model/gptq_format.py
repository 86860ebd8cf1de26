"""GPTQ checkpoints on disk: qweight, qzeros, scales, g_idx of one Linear, versions 1 and 2.

Per Linear(K -> N): qweight int32 [ceil(K·bits/32), N], qzeros int32 [G, ceil(N·bits/32)], scales fp16 [G, N],
g_idx int32 [K]; W[k, n] = scales[g_idx[k], n]·(q - z). Version 1 stores z - 1, version 2 stores z.
"""

from dataclasses import dataclass

import torch
from qzo_kernels.pack import pack_codes, packed_words, tile_codes, tiled_words, unpack_codes, untile_codes

from qzo.errors import BadInput
from qzo.model.files import Folder

BITS = (2, 3, 4, 8)
# Version 1 subtracted 1 from every lane at once: undone on the whole word, so that borrows run back too.
_ONE_PER_LANE = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_CPU = torch.device("cpu")
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class GptqConfig:
    """What quantize_config.json says. group_size -1 means one group per row of K."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    version: str = "gptq"

    @property
    def v2(self) -> bool:
        return self.version == "gptq_v2"

    def group(self, cols: int) -> int:
        return cols if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict:
        """The keys that GPTQ readers look for."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
            "desc_act": self.desc_act, "checkpoint_format": self.version, "pack_dtype": "int32", "lm_head": False,
        }  # fmt: skip


def read_config(folder: Folder) -> GptqConfig | None:
    """The quantization of a folder, None where it is not quantized. Raises BadInput for a format not understood."""
    raw = folder.config.get("quantization_config")
    where = f"{folder.path}/config.json, quantization_config"
    if raw is None and (folder.path / "quantize_config.json").exists():
        raw, where = folder.read_json("quantize_config.json"), f"{folder.path}/quantize_config.json"
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise BadInput(where, type(raw).__name__, "an object")
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
    if type(bits) is not int or bits not in BITS:
        raise BadInput(where, f"bits {bits!r}", "2, 3, 4 or 8")
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise BadInput(where, f"group_size {group_size!r}", "a positive whole number, or -1 for whole rows")
    return GptqConfig(bits, group_size, bool(raw.get("sym", True)), bool(raw.get("desc_act", False)), version)


@dataclass
class LayerTensors:
    """One quantized Linear as qzo keeps it: W[n, k] = scales[n, k // group_size]·(code - zero), columns sorted by group.

    codes int32 [N, words] in memory's layout (qzo_kernels.pack); scales fp32 [N, G]; zeros uint8 [N, G]
    or None (2**(bits - 1) everywhere); perm int64 [K] or None: sorted column p holds input channel perm[p].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None


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


def read_layer(folder: Folder, name: str, config: GptqConfig, rows: int, cols: int, device: torch.device = _CPU) -> LayerTensors:
    """The Linear `name` (K = cols -> N = rows) of a checkpoint, unpacked on `device`. Raises BadInput for wrong shapes."""
    size = config.group(cols)
    groups = -(-cols // size)
    # What stays is made before what goes: freed memory below it could not be given back.
    codes = torch.empty(rows, tiled_words(cols, config.bits), dtype=torch.int32, device=device)
    scales = _read(folder, name, "scales", (groups, rows)).to(device).t().to(torch.float32).contiguous()
    if not bool(torch.isfinite(scales).all()):
        raise BadInput(f"{folder.path}, {name}.scales", "infinities or NaN", "finite scales")
    zeros = _read(folder, name, "qzeros", (groups, packed_words(rows, config.bits))).to(device)
    zeros = unpack_zeros(zeros, config, rows).t().contiguous()
    if bool((zeros == 1 << (config.bits - 1)).all()):
        zeros = None
    perm = _permutation(folder, name, cols, size)
    perm = None if perm is None else perm.to(device)
    packed = _read(folder, name, "qweight", (packed_words(cols, config.bits), rows)).to(device)
    # Some rows at a time: unpacked as a whole, the codes and their intermediates outgrow a layer.
    few = 64 if device.type == "cpu" else 256
    for given, tiled in zip(packed.split(few, dim=1), codes.split(few), strict=True):
        plain = unpack_codes(given.t().contiguous(), config.bits, cols)
        tiled.copy_(tile_codes(plain if perm is None else plain[:, perm], config.bits))
    return LayerTensors(codes, scales, zeros, perm)


def pack_layer(codes: torch.Tensor, folder: Folder, name: str, config: GptqConfig, cols: int) -> torch.Tensor:
    """qweight int32 of the codes int32 [N, words] of Linear `name`, K = cols, as `read_layer` gives them: its inverse."""
    plain = untile_codes(codes.cpu(), config.bits, cols).to(torch.uint8)
    perm = _permutation(folder, name, cols, config.group(cols))
    if perm is not None:
        plain = plain[:, torch.argsort(perm)]
    return pack_codes(plain.contiguous(), config.bits).t().contiguous()


def _read(folder: Folder, name: str, key: str, shape: tuple[int, int]) -> torch.Tensor:
    tensor = folder.read(f"{name}.{key}")
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{folder.path}, {name}.{key}", f"shape {list(tensor.shape)}", f"{list(shape)}",
                       "config.json, bits or group_size do not fit these weights.")  # fmt: skip
    if tensor.is_floating_point() != (key == "scales") or (key != "scales" and tensor.dtype != torch.int32):
        raise BadInput(f"{folder.path}, {name}.{key}", str(tensor.dtype), "int32, and floating-point scales")
    return tensor


def _permutation(folder: Folder, name: str, cols: int, size: int) -> torch.Tensor | None:
    """Columns sorted by group, None when they are already; the sizes of the groups must be regular."""
    if f"{name}.g_idx" not in folder:
        return None
    g_idx = folder.read(f"{name}.g_idx").to(torch.int64)
    regular = torch.arange(cols) // size
    if tuple(g_idx.shape) != (cols,):
        raise BadInput(f"{folder.path}, {name}.g_idx", f"shape {list(g_idx.shape)}", f"[{cols}]")
    if torch.equal(g_idx, regular):
        return None
    perm = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[perm], regular):
        raise BadInput(f"{folder.path}, {name}.g_idx", "groups of unequal size", f"groups of {size} columns")
    return perm
