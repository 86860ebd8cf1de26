"""The public functions, as torch custom operators `qzo::…`: Triton on CUDA tensors, plain PyTorch elsewhere.

What each computes is defined in reference.py. Triton is imported by the first call that needs it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels import reference
from qzo_kernels.checks import check_float, check_matmul, check_noise, check_update, check_weight, require, weight_in
from qzo_kernels.dispatch import ROUTES, config_of, route_of


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


def _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian, codebook) -> None:
    check_weight(codes, scales, zeros, bits, group_size, cols, codebook)
    check_float("out", out.dtype)
    require("out", out, out.dtype, (codes.shape[0], cols), codes)
    if state is not None:
        check_noise(scales, state, eps, uid, gaussian)
        if len(eps) != 1:
            raise ValueError(f"eps: {len(eps)} variants; expected 1, as one weight is made")


@torch.library.custom_op("qzo::dequantize", mutates_args=("out",))
def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, state: Tensor | None, eps: Tensor | None,
    bits: int, group_size: int, cols: int, uid: int, floor: float, relative: bool, gaussian: bool, codebook: Tensor | None = None,
) -> None:  # fmt: skip
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian, codebook)
    seen = scales if state is None else reference.perturb(scales, state, eps, uid, floor, relative, gaussian)[0]
    reference.dequantize(codes, seen, zeros, bits, group_size, cols, out.dtype, out, codebook)


@_dequantize.register_kernel("cuda")
def _(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, floor, relative, gaussian, codebook=None):
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, gaussian, codebook)
    from qzo_kernels.dequant import launch_dequantize

    noise = None if state is None else Noise(state, eps, uid, floor, relative, gaussian)
    launch_dequantize(codes, scales, zeros, bits, group_size, cols, out, noise, codebook)


@_dequantize.register_fake
def _(codes, scales, zeros, out, state, eps, bits, group_size, cols, uid, floor, relative, gaussian, codebook=None):
    return None


_QUIET = (None, None)  # state and eps of no noise


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, dtype: torch.dtype,
    out: Tensor | None = None, noise: Noise | None = None, codebook: Tensor | None = None,
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
    _dequantize(codes, scales, zeros, out, state, eps, bits, group_size, cols, *rest, codebook)
    return out


@torch.library.custom_op("qzo::fused_matmul", mutates_args=())
def _fused_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, state: Tensor | None, eps: Tensor | None,
    bits: int, group_size: int, uid: int, floor: float, relative: bool, gaussian: bool,
) -> Tensor:  # fmt: skip
    check_matmul(x, codes, scales, zeros, bias, state, eps, bits, group_size, uid, gaussian)
    seen = scales[None] if state is None else reference.perturb(scales, state, eps, uid, floor, relative, gaussian)
    return reference.quant_matmul(x, codes, seen, zeros, bits, group_size, bias)


@_fused_matmul.register_kernel("cuda")
def _(x, codes, scales, zeros, bias, state, eps, bits, group_size, uid, floor, relative, gaussian):
    check_matmul(x, codes, scales, zeros, bias, state, eps, bits, group_size, uid, gaussian)
    from qzo_kernels.matmul import launch_matmul

    noise = None if state is None else Noise(state, eps, uid, floor, relative, gaussian)
    return launch_matmul(x, codes, scales, zeros, bits, group_size, bias, noise, config_of(x, codes.shape[0], noise))


@_fused_matmul.register_fake
def _(x, codes, scales, zeros, bias, state, eps, bits, group_size, uid, floor, relative, gaussian):
    return x.new_empty(x.shape[0], codes.shape[0])


def full_precision_sums() -> None:
    """cuBLAS sums its partial products in fp32, for the whole process: the loss noise of bf16 sums drowns a small eps."""
    if not torch.compiler.is_compiling():
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def quant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, bias: Tensor | None = None,
    noise: Noise | None = None, scratch: Tensor | None = None, route: str | None = None, codebook: Tensor | None = None,
) -> Tensor:
    """y [..., N] of x's dtype: see `reference.quant_matmul`.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v of `noise`.
    scratch uint8: at least N·K·itemsize bytes for a dequantized weight; allocated when needed and not given.
    route: "fused" or "dequantize"; by default the one that dispatch.py's table names for these shapes. With a codebook it is
    "dequantize". ValueError names what does not fit.
    """
    flat = x.reshape(-1, x.shape[-1])
    state, eps, *rest = noise or (*_QUIET, 0, 0.0, False, False)
    check_matmul(flat, codes, scales, zeros, bias, state, eps, bits, group_size, rest[0], rest[3], codebook)
    route = route or route_of(flat, bits, group_size, noise, codebook)
    routes = ROUTES if codebook is None else ("dequantize",)
    if route not in routes:
        raise ValueError(f"route: {route!r}; expected one of {routes}")
    if route == "fused":
        y = _fused_matmul(flat, codes, scales, zeros, bias, state, eps, bits, group_size, *rest)
    else:
        y = _dense_matmul(flat, codes, scales, zeros, bits, group_size, bias, noise, scratch, codebook)
    return y.view(*x.shape[:-1], codes.shape[0])


def _dense_matmul(x, codes, scales, zeros, bits, group_size, bias, noise, scratch, codebook) -> Tensor:
    """Dequantize the weight as each variant sees it, and multiply."""

    def fill(v: int, weight: Tensor) -> None:
        one = noise and noise._replace(state=noise.state[v : v + 1], eps=noise.eps[v : v + 1])
        dequantize(codes, scales, zeros, bits, group_size, x.shape[1], x.dtype, weight, one, codebook)

    return dense_matmul(x, codes.shape[0], 1 if noise is None else len(noise.eps), bias, scratch, fill)


def dense_matmul(
    x: Tensor, rows: int, variants: int, bias: Tensor | None, scratch: Tensor | None, fill: Callable[[int, Tensor], None]
) -> Tensor:
    """y [M, rows] of x [M, K] cut into V equal blocks, block v times the weight [rows, K] of x's dtype that fill(v, weight) writes.

    The weights lie in `scratch` one after the other; it is allocated if not given.
    """
    if x.is_cuda:
        full_precision_sums()
    shape = (rows, x.shape[1])
    weight = torch.empty(shape, dtype=x.dtype, device=x.device) if scratch is None else weight_in(scratch, x.dtype, shape, x)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for v, (part, target) in enumerate(zip(x.chunk(variants), y.chunk(variants), strict=True)):
        fill(v, weight)
        torch.mm(part, weight.t(), out=target) if bias is None else torch.addmm(bias, part, weight.t(), out=target)
    return y
