"""The public functions, as torch custom operators `qzo::…`: Triton on CUDA tensors, plain PyTorch elsewhere.

What each computes is defined in reference.py. Triton is imported by the first call that needs it.
"""

import torch
from torch import Tensor

from qzo_kernels import reference
from qzo_kernels.pack import packed_words


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, like: Tensor, contiguous: bool = True) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}; expected {like.device}, as the other arguments")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}; expected a contiguous tensor")


def _check_noise(values: Tensor, state: Tensor, fields: int, factors: Tensor, name: str, uid: int, gaussian: bool) -> None:
    if values.dim() != 2:
        raise ValueError(f"values: shape {tuple(values.shape)}; expected 2 dimensions")
    _require("values", values, torch.float32, tuple(values.shape), values)
    _require("state", state, torch.int64, (fields,), values)
    if fields == 2 and factors.dim() != 2:
        raise ValueError(f"{name}: shape {tuple(factors.shape)}; expected [steps, directions]")
    _require(name, factors, torch.float32, (1,) if fields == 3 else tuple(factors.shape), values)
    if not 0 <= uid < 1 << 32:
        raise ValueError(f"uid: {uid}; expected 0 <= uid < 2**32")
    rows, cols = values.shape
    blocks = rows * -(-cols // (4 if gaussian else 128))
    if blocks > 1 << 32:
        raise ValueError(f"values: shape {(rows, cols)} needs {blocks} noise blocks; the counter has 32 bits")


@torch.library.custom_op("qzo::perturb", mutates_args=())
def perturb(
    values: Tensor, state: Tensor, eps: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> Tensor:
    """f32 [R, C] that a forward sees: see `reference.perturb`. ValueError names an argument that does not fit."""
    _check_noise(values, state, 3, eps, "eps", uid, gaussian)
    return reference.perturb(values, state, eps, uid, floor, relative, gaussian)


@perturb.register_kernel("cuda")
def _(values, state, eps, uid, floor, relative, gaussian):
    _check_noise(values, state, 3, eps, "eps", uid, gaussian)
    from qzo_kernels.perturb import launch_perturb

    return launch_perturb(values, state, eps, uid, floor, relative, gaussian)


@perturb.register_fake
def _(values, state, eps, uid, floor, relative, gaussian):
    return torch.empty_like(values)


@torch.library.custom_op("qzo::update_", mutates_args=("values",))
def update_(
    values: Tensor, state: Tensor, coefs: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> None:
    """Apply S steps to f32 [R, C] in place: see `reference.update_`. ValueError names an argument that does not fit."""
    _check_noise(values, state, 2, coefs, "coefs", uid, gaussian)
    reference.update_(values, state, coefs, uid, floor, relative, gaussian)


@update_.register_kernel("cuda")
def _(values, state, coefs, uid, floor, relative, gaussian):
    _check_noise(values, state, 2, coefs, "coefs", uid, gaussian)
    from qzo_kernels.perturb import launch_update

    launch_update(values, state, coefs, uid, floor, relative, gaussian)


@update_.register_fake
def _(values, state, coefs, uid, floor, relative, gaussian):
    return None


def _check_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, out: Tensor) -> None:
    if codes.dim() != 2:
        raise ValueError(f"codes: shape {tuple(codes.shape)}; expected 2 dimensions")
    if group_size < 1:
        raise ValueError(f"group_size = {group_size}: expected at least 1")
    rows, groups = codes.shape[0], -(-cols // group_size)
    _require("codes", codes, torch.int32, (rows, packed_words(cols, bits)), codes)
    _require("scales", scales, torch.float32, (rows, groups), codes)
    _require("zeros", zeros, torch.uint8, (rows, groups), codes, contiguous=False)
    if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {out.dtype}: expected float32, bfloat16 or float16")
    _require("out", out, out.dtype, (rows, cols), codes)


@torch.library.custom_op("qzo::dequantize_out", mutates_args=("out",))
def _dequantize_out(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, out: Tensor
) -> None:
    _check_dequantize(codes, scales, zeros, bits, group_size, cols, out)
    reference.dequantize(codes, scales, zeros, bits, group_size, cols, out.dtype, out)


@_dequantize_out.register_kernel("cuda")
def _(codes, scales, zeros, bits, group_size, cols, out):
    _check_dequantize(codes, scales, zeros, bits, group_size, cols, out)
    from qzo_kernels.dequant import launch_dequantize

    launch_dequantize(codes, scales, zeros, bits, group_size, cols, out)


@_dequantize_out.register_fake
def _(codes, scales, zeros, bits, group_size, cols, out):
    return None


@torch.library.custom_op("qzo::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, dtype: torch.dtype
) -> Tensor:
    out = codes.new_empty(codes.shape[0], cols, dtype=dtype)
    _dequantize_out(codes, scales, zeros, bits, group_size, cols, out)
    return out


@_dequantize.register_fake
def _(codes, scales, zeros, bits, group_size, cols, dtype):
    return codes.new_empty(codes.shape[0], cols, dtype=dtype)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Weights [N, cols] of `dtype`, into `out` if given: see `reference.dequantize`. ValueError names what does not fit.

    Two operators, because one may not return its own argument: qzo::dequantize and, with `out`, qzo::dequantize_out.
    """
    if out is None:
        return _dequantize(codes, scales, zeros, bits, group_size, cols, dtype)
    if out.dtype != dtype:
        raise ValueError(f"out: {out.dtype}; expected {dtype}")
    _dequantize_out(codes, scales, zeros, bits, group_size, cols, out)
    return out
