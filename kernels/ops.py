"""The public functions, as torch custom operators `qzo::…`: Triton on CUDA tensors, plain PyTorch elsewhere.

What each computes is defined in reference.py. Triton is imported by the first call that needs it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels import reference
from qzo_kernels.checks import check_float, check_noise, check_update, check_weight, require


class Noise(NamedTuple):
    """Noise on the scales of one tensor, for V variants of them: the last arguments of the operators below.

    state int64 [V, 3], rows (seed, step, direction); eps f32 [V], signed, 0 for none; the rest as in `reference.perturb`.
    """

    state: Tensor
    eps: Tensor
    uid: int
    floor: float
    relative: bool
    gaussian: bool


@torch.library.custom_op("qzo::perturb", mutates_args=())
def perturb(
    values: Tensor, state: Tensor, eps: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> Tensor:
    """f32 [V, R, C] that forwards see: see `reference.perturb`. ValueError names an argument that does not fit."""
    check_noise(values, state, eps, uid, gaussian)
    return reference.perturb(values, state, eps, uid, floor, relative, gaussian)


@perturb.register_kernel("cuda")
def _(values, state, eps, uid, floor, relative, gaussian):
    check_noise(values, state, eps, uid, gaussian)
    from qzo_kernels.perturb import launch_perturb

    return launch_perturb(values, state, eps, uid, floor, relative, gaussian)


@perturb.register_fake
def _(values, state, eps, uid, floor, relative, gaussian):
    return values.new_empty(eps.shape[0], *values.shape)


@torch.library.custom_op("qzo::update_", mutates_args=("values",))
def update_(
    values: Tensor, state: Tensor, coefs: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> None:
    """Apply S steps to f32 [R, C] in place: see `reference.update_`. ValueError names an argument that does not fit."""
    check_update(values, state, coefs, uid, gaussian)
    reference.update_(values, state, coefs, uid, floor, relative, gaussian)


@update_.register_kernel("cuda")
def _(values, state, coefs, uid, floor, relative, gaussian):
    check_update(values, state, coefs, uid, gaussian)
    from qzo_kernels.perturb import launch_update

    launch_update(values, state, coefs, uid, floor, relative, gaussian)


@update_.register_fake
def _(values, state, coefs, uid, floor, relative, gaussian):
    return None


def _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian) -> None:
    check_weight(codes, scales, zeros, bits, group_size, cols)
    check_float("out", out.dtype)
    require("out", out, out.dtype, (codes.shape[0], cols), codes)
    if state is not None:
        check_noise(scales, state, eps, uid, gaussian)
        if len(eps) != 1:
            raise ValueError(f"eps: {len(eps)} variants; expected 1, as one weight is made")


@torch.library.custom_op("qzo::dequantize", mutates_args=("out",))
def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, state: Tensor | None, eps: Tensor | None,
    bits: int, group_size: int, cols: int, uid: int, floor: float, relative: bool, gaussian: bool,
) -> None:  # fmt: skip
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian)
    seen = scales if state is None else reference.perturb(scales, state, eps, uid, floor, relative, gaussian)[0]
    reference.dequantize(codes, seen, zeros, bits, group_size, cols, out.dtype, out)


@_dequantize.register_kernel("cuda")
def _(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, floor, relative, gaussian):
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian)
    from qzo_kernels.dequant import launch_dequantize

    noise = None if state is None else Noise(state, eps, uid, floor, relative, gaussian)
    launch_dequantize(codes, scales, zeros, bits, group_size, cols, out, noise)


@_dequantize.register_fake
def _(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, floor, relative, gaussian):
    return None


_QUIET = (None, None)  # state and eps of no noise


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, dtype: torch.dtype,
    out: Tensor | None = None, noise: Noise | None = None,
) -> Tensor:
    """Weights [N, cols] of `dtype`, into `out` if given: see `reference.dequantize`.

    With `noise` of one variant the scales are those of `perturb`. ValueError names what does not fit.
    """
    check_float("dtype", dtype)
    if out is None:
        out = codes.new_empty(codes.shape[0], cols, dtype=dtype)
    if out.dtype != dtype:
        raise ValueError(f"out: {out.dtype}; expected {dtype}")
    state, eps, *rest = noise or (*_QUIET, 0, 0.0, False, False)
    _dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, *rest)
    return out


def quant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, bias: Tensor | None = None,
    noise: Noise | None = None, scratch: Tensor | None = None,
) -> Tensor:
    """y [..., N] of x's dtype: see `reference.quant_matmul`.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v of `noise`.
    scratch uint8: at least N·K·itemsize bytes in which a dequantized weight may lie; allocated if not given.
    ValueError names what does not fit.
    """
    check_float("x", x.dtype)
    cols, rows = x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, cols)
    variants = 1 if noise is None else len(noise.eps)
    if len(flat) % variants:
        raise ValueError(f"x: {len(flat)} rows; expected a multiple of the {variants} variants of the noise")
    weight = None
    if scratch is not None:
        size = rows * cols * x.dtype.itemsize
        if scratch.dtype != torch.uint8 or scratch.numel() < size or scratch.device != x.device:
            raise ValueError(f"scratch: {scratch.dtype} of {scratch.numel()} on {scratch.device}; expected uint8, {size} or more, on {x.device}")
        weight = scratch[:size].view(x.dtype).view(rows, cols)
    y = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    for v, (part, target) in enumerate(zip(flat.chunk(variants), y.chunk(variants), strict=True)):
        one = noise and noise._replace(state=noise.state[v : v + 1], eps=noise.eps[v : v + 1])
        weight = dequantize(codes, scales, zeros, bits, group_size, cols, x.dtype, weight, one)
        torch.mm(part, weight.t(), out=target) if bias is None else torch.addmm(bias, part, weight.t(), out=target)
    return y.view(*x.shape[:-1], rows)
