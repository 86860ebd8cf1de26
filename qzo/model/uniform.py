"""What the formats share: one Linear as qzo keeps it, and the checks and steps that bring it there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from qzo_kernels.pack import tile_codes, tiled_words

from qzo.errors import BadInput
from qzo.model.files import Folder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Quantization:
    """What a config says of every format. group_size -1: one group per row of K; sym: zeros are 2**(bits - 1) everywhere; desc_act: columns
    are reordered; codebook: codes name levels of a table, and so have no neighbours; version: the name under --format that writes the
    same one again."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    version: str = ""
    codebook: bool = False

    def group(self, cols: int) -> int:
        """Columns per scale of a weight with `cols`."""
        return cols if self.group_size == -1 else self.group_size


@dataclass
class InputGrid:
    """What a Linear of ZeroQAT does to its input before the product: (x - shift) / divisor, where nobody before it does that; then every row
    on the asymmetric grid of `bits` (4, 6, 8; 16: none) over the part `span` of its range, as qzo_kernels.reference_qat.fake_quantize_rows.

    span fp32 [1]; shift and divisor fp32 [K], both or neither.
    """

    bits: int
    span: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    divisor: torch.Tensor | None = None


@dataclass
class LayerTensors:
    """One quantized Linear as qzo keeps it: W[n, k] = scales[n, k // group_size]·(code - zero), columns sorted by group.

    codes int32 [N, words] in memory's layout (qzo_kernels.pack); scales fp32 [N, G]; zeros uint8 [N, G]
    or None (2**(bits - 1) everywhere); perm int64 [K] or None: sorted column p holds input channel perm[p].
    With codebook fp32 [2**bits] it is W[n, k] = scales[n, k // group_size]·codebook[code], and zeros are None. With a codebook of
    vectors [C, S, 8] codes are as qzo_kernels.reference_vectors has them, and scales are of rows. grid: what the input is rounded to.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    codebook: torch.Tensor | None = None
    grid: InputGrid | None = None


@dataclass
class Moved:
    """What an export writes instead of the base's: scales [N, G] as the format's `rounded` gives them, codes uint8 [N, K] sorted by group; None: nothing."""

    scales: torch.Tensor | None = None
    codes: torch.Tensor | None = None


def in_order(codes: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """Codes [N, K] sorted by group in the order of the model's channels."""
    return codes if perm is None else codes[:, torch.argsort(perm)].contiguous()


def raw_config(folder: Folder) -> tuple[dict, str] | None:
    """(the quantization config of a folder, where it stands), None where there is none. Raises BadInput where it is no object."""
    raw = folder.config.get("quantization_config")
    where = f"{folder.path}/config.json, quantization_config"
    if raw is None and (folder.path / "quantize_config.json").exists():
        raw, where = folder.read_json("quantize_config.json"), f"{folder.path}/quantize_config.json"
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise BadInput(where, type(raw).__name__, "an object")
    return raw, where


def check_bits(where: str, bits: object, known: tuple[int, ...], named: str) -> None:
    """Raises BadInput for bits that are none of `known`, whose names are `named`."""
    if type(bits) is not int or bits not in known:
        raise BadInput(where, f"bits {bits!r}", named)


def check_group_size(where: str, group_size: object) -> None:
    """Raises BadInput for what is neither a positive whole number nor -1."""
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise BadInput(where, f"group_size {group_size!r}", "a positive whole number, or -1 for whole rows")


def read_tensor(folder: Folder, name: str, key: str, shape: tuple[int, int], scales: bool = False) -> torch.Tensor:
    """The tensor `name.key`: int32, or floating-point for scales. Raises BadInput for another shape or dtype."""
    tensor = folder.read(f"{name}.{key}")
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{folder.path}, {name}.{key}", f"shape {list(tensor.shape)}", f"{list(shape)}",
                       "config.json, bits or group_size do not fit these weights.")  # fmt: skip
    if tensor.is_floating_point() != scales or (not scales and tensor.dtype != torch.int32):
        raise BadInput(f"{folder.path}, {name}.{key}", str(tensor.dtype), "int32, and floating-point scales")
    return tensor


def exact_tensor(folder: Folder, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor `name`. Raises BadInput for another shape or dtype."""
    tensor = folder.read(name)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise BadInput(f"{folder.path}, {name}", f"{tensor.dtype} of shape {list(tensor.shape)}", f"{dtype} of shape {list(shape)}")
    return tensor


def finite_scales(scales: torch.Tensor, where: str) -> torch.Tensor:
    """fp32, contiguous. Raises BadInput for infinities and NaN."""
    scales = scales.to(torch.float32).contiguous()
    if not bool(torch.isfinite(scales).all()):
        raise BadInput(where, "infinities or NaN", "finite scales")
    return scales


def plain_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor | None:
    """uint8 [N, G], None where all are 2**(bits - 1)."""
    zeros = zeros.contiguous()
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros


def empty_codes(rows: int, cols: int, bits: int, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, tiled_words(cols, bits), dtype=torch.int32, device=device)


def fill_codes(codes: torch.Tensor, bits: int, unpacked: Callable[[int, int], torch.Tensor], perm: torch.Tensor | None) -> None:
    """Write memory's layout into `codes`; unpacked(start, end) gives the uint8 codes [end - start, K] of some rows."""
    # Some rows at a time: unpacked as a whole, the codes and their intermediates outgrow a layer.
    few = 64 if codes.device.type == "cpu" else 256
    for start in range(0, len(codes), few):
        end = min(start + few, len(codes))
        plain = unpacked(start, end)
        codes[start:end].copy_(tile_codes(plain if perm is None else plain[:, perm], bits))


def permutation(folder: Folder, name: str, cols: int, size: int) -> torch.Tensor | None:
    """Columns sorted by the groups in the tensor `name`, None when they are already or it is absent.

    Raises BadInput where the groups are not regular.
    """
    if name not in folder:
        return None
    g_idx = folder.read(name).to(torch.int64)
    regular = torch.arange(cols) // size
    if tuple(g_idx.shape) != (cols,):
        raise BadInput(f"{folder.path}, {name}", f"shape {list(g_idx.shape)}", f"[{cols}]")
    if torch.equal(g_idx, regular):
        return None
    perm = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[perm], regular):
        raise BadInput(f"{folder.path}, {name}", "groups of unequal size", f"groups of {size} columns")
    return perm
