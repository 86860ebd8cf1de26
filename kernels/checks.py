"""What the operators take: a tensor that does not fit is a ValueError that names it."""

import torch
from torch import Tensor

from qzo_kernels.pack import tiled_words

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, like: Tensor, contiguous: bool = True) -> None:
    """The tensor has this dtype and shape and lies beside `like`."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}; expected {like.device}, as the other arguments")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}; expected a contiguous tensor")


def check_values(values: Tensor, uid: int, gaussian: bool) -> None:
    """`values` is f32 [R, C] whose noise blocks the generator can count."""
    if values.dim() != 2:
        raise ValueError(f"values: shape {tuple(values.shape)}; expected 2 dimensions")
    require("values", values, torch.float32, tuple(values.shape), values)
    if not 0 <= uid < 1 << 32:
        raise ValueError(f"uid: {uid}; expected 0 <= uid < 2**32")
    rows, cols = values.shape
    blocks = rows * -(-cols // (4 if gaussian else 128))
    if blocks > 1 << 32:
        raise ValueError(f"values: shape {(rows, cols)} needs {blocks} noise blocks; the counter has 32 bits")


def check_noise(values: Tensor, state: Tensor, eps: Tensor, uid: int, gaussian: bool) -> None:
    """state int64 [V, 3] and eps f32 [V] for `values` f32 [R, C]."""
    check_values(values, uid, gaussian)
    if eps.dim() != 1 or not len(eps):
        raise ValueError(f"eps: shape {tuple(eps.shape)}; expected [variants]")
    require("eps", eps, torch.float32, tuple(eps.shape), values)
    require("state", state, torch.int64, (len(eps), 3), values)


def check_update(values: Tensor, state: Tensor, coefs: Tensor, uid: int, gaussian: bool) -> None:
    """state int64 [2] and coefs f32 [S, D] for `values` f32 [R, C]."""
    check_values(values, uid, gaussian)
    require("state", state, torch.int64, (2,), values)
    if coefs.dim() != 2:
        raise ValueError(f"coefs: shape {tuple(coefs.shape)}; expected [steps, directions]")
    require("coefs", coefs, torch.float32, tuple(coefs.shape), values)


def check_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, codebook: Tensor | None = None
) -> None:
    """codes, scales, and zeros or a codebook, of one weight [N, cols]."""
    if codes.dim() != 2:
        raise ValueError(f"codes: shape {tuple(codes.shape)}; expected 2 dimensions")
    if group_size < 1:
        raise ValueError(f"group_size = {group_size}: expected at least 1")
    rows, groups = codes.shape[0], -(-cols // group_size)
    require("codes", codes, torch.int32, (rows, tiled_words(cols, bits)), codes)
    require("scales", scales, torch.float32, (rows, groups), codes)
    if zeros is not None:
        require("zeros", zeros, torch.uint8, (rows, groups), codes, contiguous=False)
    if codebook is not None:
        require("codebook", codebook, torch.float32, (1 << bits,), codes)
        if zeros is not None:
            raise ValueError("zeros: given with a codebook, whose levels have none; expected None")


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name}: {dtype}; expected float32, bfloat16 or float16")


def check_matmul(x, codes, scales, zeros, bias, state, eps, bits, group_size, uid, gaussian, codebook=None) -> None:
    """x [M, K] with a weight, a bias and noise (state None: without), as `quant_matmul` takes them."""
    if x.dim() != 2 or x.device != codes.device:
        raise ValueError(f"x: shape {tuple(x.shape)} on {x.device}; expected [rows, columns] on {codes.device}")
    check_float("x", x.dtype)
    check_weight(codes, scales, zeros, bits, group_size, x.shape[1], codebook)
    if bias is not None:
        require("bias", bias, x.dtype, (codes.shape[0],), x)
    if state is not None:
        check_noise(scales, state, eps, uid, gaussian)
        if x.shape[0] % len(eps):
            raise ValueError(f"x: {x.shape[0]} rows; expected a multiple of the {len(eps)} variants of the noise")


def weight_in(scratch: Tensor, dtype: torch.dtype, shape: tuple[int, int], like: Tensor) -> Tensor:
    """The beginning of `scratch` uint8 as a weight of this dtype and shape, beside `like`."""
    size = shape[0] * shape[1] * dtype.itemsize
    if scratch.dtype != torch.uint8 or scratch.numel() < size or scratch.device != like.device:
        given = f"{scratch.dtype} of {scratch.numel()} on {scratch.device}"
        raise ValueError(f"scratch: {given}; expected uint8, {size} or more, on {like.device}")
    return scratch[:size].view(dtype).view(shape)
