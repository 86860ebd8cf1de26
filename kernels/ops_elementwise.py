"""The operators between the matmuls of a decoder, as torch custom operators: Triton on CUDA tensors, plain PyTorch elsewhere.

What each computes is defined in reference_elementwise.py. None has a gradient.
"""

import torch
from torch import Tensor

from qzo_kernels import reference_elementwise as reference
from qzo_kernels.checks import check_float, require

_MAX_WIDTH = 1 << 16  # a row of a norm lies in the registers of one program


def _check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check_float("x", x.dtype)
    if x.dim() < 1 or not 0 < x.shape[-1] <= _MAX_WIDTH:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected rows of 1 to {_MAX_WIDTH}")
    require("x", x, x.dtype, tuple(x.shape), x)
    require("weight", weight, x.dtype, (x.shape[-1],), x)
    if residual is not None:
        require("residual", residual, x.dtype, tuple(x.shape), x)


@torch.library.custom_op("qzo::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_rms_norm(x, weight, None)
    return reference.rms_norm(x, weight, eps)[0]


@_rms_norm.register_kernel("cuda")
def _(x, weight, eps):
    _check_rms_norm(x, weight, None)
    from qzo_kernels.elementwise import launch_rms_norm

    return launch_rms_norm(x, weight, eps, None)[0]


@_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


@torch.library.custom_op("qzo::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    _check_rms_norm(x, weight, residual)
    return reference.rms_norm(x, weight, eps, residual)


@_add_rms_norm.register_kernel("cuda")
def _(x, weight, eps, residual):
    _check_rms_norm(x, weight, residual)
    from qzo_kernels.elementwise import launch_rms_norm

    return launch_rms_norm(x, weight, eps, residual)


@_add_rms_norm.register_fake
def _(x, weight, eps, residual):
    return torch.empty_like(x), torch.empty_like(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(normed, sum) [..., H], contiguous as x must be: see `reference_elementwise.rms_norm`.

    Without a residual, sum is x itself. H up to 65536. ValueError names what does not fit.
    """
    return (_rms_norm(x, weight, eps), x) if residual is None else _add_rms_norm(x, weight, eps, residual)


def _check_silu_mul(gate: Tensor, up: Tensor) -> None:
    check_float("gate", gate.dtype)
    if gate.dim() < 1 or not gate.shape[-1]:
        raise ValueError(f"gate: shape {tuple(gate.shape)}; expected rows of at least 1")
    require("up", up, gate.dtype, tuple(gate.shape), gate, contiguous=False)
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()}; expected rows that are contiguous")


@torch.library.custom_op("qzo::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """[..., I], contiguous: see `reference_elementwise.silu_mul`. gate and up may be halves of one tensor."""
    _check_silu_mul(gate, up)
    return reference.silu_mul(gate, up).contiguous()


@silu_mul.register_kernel("cuda")
def _(gate, up):
    _check_silu_mul(gate, up)
    from qzo_kernels.elementwise import launch_silu_mul

    return launch_silu_mul(gate, up)


@silu_mul.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


def _check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float("q", q.dtype)
    if cos.dim() != 2 or not cos.shape[1] or cos.shape[1] % 2:
        raise ValueError(f"cos: shape {tuple(cos.shape)}; expected [T, D] with an even D")
    length, dim = cos.shape
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or x.shape[0] != q.shape[0] or x.shape[1] != length or not x.shape[2] or x.shape[2] % dim:
            raise ValueError(f"{name}: shape {tuple(x.shape)}; expected [{q.shape[0]}, {length}, heads * {dim}]")
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: strides {x.stride()}; expected rows that are contiguous")
    require("k", k, q.dtype, tuple(k.shape), q, contiguous=False)
    require("cos", cos, q.dtype, (length, dim), q)
    require("sin", sin, q.dtype, (length, dim), q)


@torch.library.custom_op("qzo::rotary", mutates_args=())
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(q [B, Hq, T, D], k [B, Hk, T, D]), rotated, for attention: see `reference_elementwise.rotary`.

    q [B, T, Hq·D] and k [B, T, Hk·D] may be slices of one tensor. ValueError names what does not fit.
    """
    _check_rotary(q, k, cos, sin)
    return reference.rotary(q, k, cos, sin)


@rotary.register_kernel("cuda")
def _(q, k, cos, sin):
    _check_rotary(q, k, cos, sin)
    from qzo_kernels.elementwise import launch_rotary

    return launch_rotary(q, k, cos, sin)


@rotary.register_fake
def _(q, k, cos, sin):
    (batch, seq, _), dim = q.shape, cos.shape[-1]
    return tuple(x.new_empty(batch, seq, x.shape[-1] // dim, dim).transpose(1, 2) for x in (q, k))
