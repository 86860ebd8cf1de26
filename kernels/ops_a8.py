"""Matmuls with 8-bit activations, as torch custom operators `qzo::…`: int8 and e4m3, with weights of 2, 3, 4 or 8 bits.

What each computes is defined in reference_a8.py. Triton is imported by the first call that needs it.
"""

import torch
from torch import Tensor

from qzo_kernels import ops, reference_a8
from qzo_kernels.checks import check_float, check_matmul, require, weight_in
from qzo_kernels.pack import TILE, tiled_words

_MOST = 1 << 16  # columns of an int8 row of one group: its sum stays in 31 bits


def _check_kind(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kinds = {dtype for dtype, _ in reference_a8.LARGEST.values()}
    if dtype not in kinds:
        raise ValueError(f"{name}: {dtype}; expected torch.int8 or torch.float8_e4m3fn")
    if dtype == torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        device_name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ValueError(f"fp8: {device_name} of capability {major}.{minor}; expected 8.9 or above: use int8")


def _dtype_of(kind: str, device: torch.device) -> torch.dtype:
    if kind not in reference_a8.LARGEST:
        raise ValueError(f"kind = {kind!r}: expected one of {tuple(reference_a8.LARGEST)}")
    _check_kind("kind", reference_a8.LARGEST[kind][0], device)
    return reference_a8.LARGEST[kind][0]


def _check_group_size(group_size: int, cols: int, kind: str = "") -> None:
    if group_size < 1 or (group_size < cols and group_size % 32):
        raise ValueError(f"group_size = {group_size}: 8-bit activations take multiples of 32, or whole rows ({cols} and up)")
    if kind == "int8" and group_size >= cols > _MOST:
        raise ValueError(f"group_size = {group_size}: one int8 group of {cols} columns; expected at most {_MOST}")


def check_kind(kind: str, zeros: Tensor | None, bits: int, group_size: int, cols: int, device: torch.device) -> None:
    """ValueError unless a device multiplies 8-bit rows of `kind` with weights like these."""
    _dtype_of(kind, device)
    _check_group_size(group_size, cols, kind)
    if zeros is not None and bits == 8 and kind == "fp8":
        raise ValueError("zeros: given with e4m3 codes of 8 bits, which have none; expected None")


def _check_rows(x: Tensor, kind: str) -> None:
    check_float("x", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected 2 dimensions")
    require("x", x, x.dtype, tuple(x.shape), x)
    _dtype_of(kind, x.device)


@torch.library.custom_op("qzo::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(q [M, K], scale f32 [M]) of contiguous x [M, K]; kind "int8" or "fp8": see `reference_a8.quantize_rows`."""
    _check_rows(x, kind)
    return reference_a8.quantize_rows(x, kind)


@quantize_rows.register_kernel("cuda")
def _(x, kind):
    _check_rows(x, kind)
    from qzo_kernels.a8_rows import launch_quantize_rows

    return launch_quantize_rows(x, kind)


@quantize_rows.register_fake
def _(x, kind):
    return x.new_empty(x.shape, dtype=reference_a8.LARGEST[kind][0]), x.new_empty(len(x), dtype=torch.float32)


def _check_unpack(codes: Tensor, zeros: Tensor | None, out: Tensor, bits: int, group_size: int) -> None:
    _check_kind("out", out.dtype, out.device)
    if codes.dim() != 2 or out.dim() != 2:
        raise ValueError(f"codes: shape {tuple(codes.shape)}, out: shape {tuple(out.shape)}; expected 2 dimensions")
    rows, cols = out.shape
    require("codes", codes, torch.int32, (rows, tiled_words(cols, bits)), out)
    require("out", out, out.dtype, (rows, cols), codes)
    _check_group_size(group_size, cols)
    if zeros is not None:
        require("zeros", zeros, torch.uint8, (rows, -(-cols // group_size)), codes, contiguous=False)
    if bits == 8 and out.dtype != torch.int8 and zeros is not None:
        raise ValueError("zeros: given with e4m3 codes of 8 bits, which have none; expected None")


@torch.library.custom_op("qzo::unpack", mutates_args=("out",))
def _unpack(codes: Tensor, zeros: Tensor | None, out: Tensor, bits: int, group_size: int) -> None:
    _check_unpack(codes, zeros, out, bits, group_size)
    reference_a8.unpack(codes, zeros, bits, group_size, out)


@_unpack.register_kernel("cuda")
def _(codes, zeros, out, bits, group_size):
    _check_unpack(codes, zeros, out, bits, group_size)
    from qzo_kernels.a8_rows import launch_unpack

    launch_unpack(codes, zeros, bits, group_size, out.shape[1], out)


@_unpack.register_fake
def _(codes, zeros, out, bits, group_size):
    return None


def unpack(
    codes: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, kind: str, out: Tensor | None = None
) -> Tensor:
    """Weights [N, cols], int8 or e4m3, into `out` if given: see `reference_a8.unpack`. ValueError names what does not fit."""
    dtype = _dtype_of(kind, codes.device)
    if out is None:
        out = codes.new_empty(codes.shape[0], cols, dtype=dtype)
    require("out", out, dtype, (codes.shape[0], cols), codes)
    _unpack(codes, zeros, out, bits, group_size)
    return out


def _check_matmul(xq, x_scale, wq, scales, group_size, dtype, bias, zeros, xsums, shift, wsum) -> None:
    check_float("dtype", dtype)
    _check_kind("xq", xq.dtype, xq.device)
    for name, tensor, dims in (("xq", xq, 2), ("wq", wq, 2), ("scales", scales, 3)):
        if tensor.dim() != dims:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected {dims} dimensions")
    (rows, cols), n, variants = xq.shape, len(wq), len(scales)
    _check_group_size(group_size, cols, "int8" if xq.dtype == torch.int8 else "fp8")
    groups = -(-cols // group_size)
    require("xq", xq, xq.dtype, (rows, cols), xq)
    require("wq", wq, xq.dtype, (n, cols), xq)
    require("x_scale", x_scale, torch.float32, (rows,), xq)
    require("scales", scales, torch.float32, (variants, n, groups), xq)
    if not variants or rows % variants:
        raise ValueError(f"xq: {rows} rows; expected a multiple of the {variants} variants of the scales")
    if bias is not None:
        require("bias", bias, dtype, (n,), xq)
    if zeros is not None:
        require("zeros", zeros, torch.uint8, (n, groups), xq, contiguous=False)
        if xq.dtype != torch.int8:
            raise ValueError(f"zeros: given with xq of {xq.dtype}; they correct int8 products of 8-bit codes only")
    if xsums is not None:
        require("xsums", xsums, torch.int32, (rows, groups), xq)
    if (shift is None) != (wsum is None):
        raise ValueError(f"{'shift' if shift is None else 'wsum'}: None; expected a tensor, as the other one of the two is given")
    if shift is not None:
        require("shift", shift, torch.float32, (rows,), xq)
        require("wsum", wsum, torch.float32, (variants, n), xq)


@torch.library.custom_op("qzo::a8_matmul", mutates_args=())
def a8_matmul(
    xq: Tensor, x_scale: Tensor, wq: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype,
    bias: Tensor | None = None, zeros: Tensor | None = None, xsums: Tensor | None = None,
    shift: Tensor | None = None, wsum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] of `dtype`: see `reference_a8.a8_matmul`. xsums int32 [M, G]: the sums of xq over the groups, if at hand.

    group_size: a multiple of 32, or K and up. ValueError names what does not fit.
    """
    _check_matmul(xq, x_scale, wq, scales, group_size, dtype, bias, zeros, xsums, shift, wsum)
    return reference_a8.a8_matmul(xq, x_scale, wq, scales, group_size, dtype, bias, zeros, shift, wsum)


@a8_matmul.register_kernel("cuda")
def _(xq, x_scale, wq, scales, group_size, dtype, bias=None, zeros=None, xsums=None, shift=None, wsum=None):
    _check_matmul(xq, x_scale, wq, scales, group_size, dtype, bias, zeros, xsums, shift, wsum)
    from qzo_kernels.a8_matmul import launch_a8_matmul
    from qzo_kernels.a8_rows import launch_group_sums

    if zeros is not None and xsums is None:
        xsums = launch_group_sums(xq, group_size)
    return launch_a8_matmul(xq, x_scale, wq, scales, group_size, dtype, bias, zeros, xsums, shift=shift, wsum=wsum)


@a8_matmul.register_fake
def _(xq, x_scale, wq, scales, group_size, dtype, bias=None, zeros=None, xsums=None, shift=None, wsum=None):
    return xq.new_empty(len(xq), len(wq), dtype=dtype)


def takes_packed(bits: int, group_size: int, cols: int) -> bool:
    """Whether the weights can go from their packed codes into the product."""
    return bits in (4, 8) and (group_size % TILE == 0 or group_size >= cols)


@torch.library.custom_op("qzo::a8_packed", mutates_args=())
def _a8_packed(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, state: Tensor | None, eps: Tensor | None,
    bits: int, group_size: int, kind: str, uid: int, floor: float, relative: bool, gaussian: bool,
) -> Tensor:  # fmt: skip
    noise = None if state is None else ops.Noise(state, eps, uid, floor, relative, gaussian)
    return _through_weight(x, codes, scales, zeros, bits, group_size, kind, bias, noise, None)


@_a8_packed.register_kernel("cuda")
def _(x, codes, scales, zeros, bias, state, eps, bits, group_size, kind, uid, floor, relative, gaussian):
    from qzo_kernels.a8_packed import launch_a8_packed
    from qzo_kernels.a8_rows import launch_quantize_rows

    noise = None if state is None else ops.Noise(state, eps, uid, floor, relative, gaussian)
    xq, x_scale = launch_quantize_rows(x, kind, bits)
    return launch_a8_packed(xq, x_scale, codes, scales, zeros, bits, group_size, x.shape[1], x.dtype, bias, noise)


@_a8_packed.register_fake
def _(x, codes, scales, zeros, bias, state, eps, bits, group_size, kind, uid, floor, relative, gaussian):
    return x.new_empty(x.shape[0], codes.shape[0])


def _through_weight(x, codes, scales, zeros, bits, group_size, kind, bias, noise, weight) -> Tensor:
    """The product with the whole 8-bit weight in memory."""
    xq, x_scale = quantize_rows(x, kind)
    seen = scales[None] if noise is None else ops.perturb(scales, *noise)
    weight = unpack(codes, zeros, bits, group_size, x.shape[1], kind, weight)
    return a8_matmul(xq, x_scale, weight, seen, group_size, x.dtype, bias, zeros if bits == 8 else None)


def quant_matmul_a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, kind: str,
    bias: Tensor | None = None, noise: ops.Noise | None = None, scratch: Tensor | None = None,
) -> Tensor:
    """y [..., N] of x's dtype with x rounded to 8 bits per row, weights as `ops.quant_matmul` has them.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v of `noise`. `zeros` None
    says that all are 2^(bits - 1). kind "int8", or "fp8" (e4m3), for which codes of 8 bits are e4m3 numbers themselves, without zeros.
    scratch uint8: N·K bytes or more in which the 8-bit weight may lie where `takes_packed` says no; allocated if not given.
    ValueError names what does not fit.
    """
    cols, rows = x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, cols).contiguous()
    state, eps, *rest = noise or (None, None, 0, 0.0, False, False)
    check_matmul(flat, codes, scales, zeros, bias, state, eps, bits, group_size, rest[0], rest[3])
    check_kind(kind, zeros, bits, group_size, cols, x.device)
    if takes_packed(bits, group_size, cols):
        y = _a8_packed(flat, codes, scales, zeros, bias, state, eps, bits, group_size, kind, *rest)
    else:
        weight = None if scratch is None else weight_in(scratch, reference_a8.LARGEST[kind][0], (rows, cols), x)
        y = _through_weight(flat, codes, scales, zeros, bits, group_size, kind, bias, noise, weight)
    return y.view(*x.shape[:-1], rows)
