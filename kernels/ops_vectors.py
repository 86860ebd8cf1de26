"""Products with weights of vector codebooks, as torch custom operators: see reference_vectors.py."""

import torch
from torch import Tensor

from qzo_kernels import reference_vectors
from qzo_kernels.checks import check_float, require
from qzo_kernels.ops import Noise, dense_matmul, perturb
from qzo_kernels.reference_vectors import WIDTH, vector_words


def _check(codes: Tensor, codebooks: Tensor, out: Tensor) -> None:
    if codebooks.dim() != 3 or codebooks.shape[1] not in (256, 65536) or codebooks.shape[2] != WIDTH:
        raise ValueError(f"codebooks: shape {tuple(codebooks.shape)}; expected [codebooks, 256 or 65536, {WIDTH}]")
    check_float("codebooks", codebooks.dtype)
    require("codebooks", codebooks, codebooks.dtype, tuple(codebooks.shape), codes)
    if out.dim() != 2 or out.shape[1] % WIDTH:
        raise ValueError(f"out: shape {tuple(out.shape)}; expected [rows, a multiple of {WIDTH}]")
    check_float("out", out.dtype)
    require("out", out, out.dtype, tuple(out.shape), codes)
    require("codes", codes, torch.int32, (out.shape[0], vector_words(out.shape[1], *codebooks.shape[:2])), codes)


@torch.library.custom_op("qzo::vector_dequantize", mutates_args=("out",))
def _vector_dequantize(codes: Tensor, codebooks: Tensor, out: Tensor) -> None:
    _check(codes, codebooks, out)
    reference_vectors.vector_dequantize(codes, codebooks, out.shape[1], out.dtype, out)


@_vector_dequantize.register_kernel("cuda")
def _(codes, codebooks, out):
    _check(codes, codebooks, out)
    from qzo_kernels.vectors import launch_vector_dequantize

    launch_vector_dequantize(codes, codebooks, out)


@_vector_dequantize.register_fake
def _(codes, codebooks, out):
    return None


def vector_dequantize(codes: Tensor, codebooks: Tensor, cols: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """U [N, cols] of `dtype`, into `out` if given: see `reference_vectors.vector_dequantize`. ValueError names what does not fit."""
    out = torch.empty(codes.shape[0], cols, dtype=dtype, device=codes.device) if out is None else out
    _vector_dequantize(codes, codebooks, out)
    return out


def vector_matmul(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None, noise: Noise | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """y [..., N] of x's dtype: see `reference_vectors.vector_matmul`; here U and its product with x are rounded to x's dtype.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v of `noise` on scales f32 [N, 1].
    scratch uint8: at least N·K·itemsize bytes for U; allocated if not given. ValueError names what does not fit.
    """
    flat = x.reshape(-1, x.shape[-1])
    require("scales", scales, torch.float32, (codes.shape[0], 1), x)
    if bias is not None:
        require("bias", bias, x.dtype, (codes.shape[0],), x)
    seen = scales[None] if noise is None else perturb(scales, *noise)
    if len(flat) % len(seen):
        raise ValueError(f"x: {len(flat)} rows; expected a multiple of the {len(seen)} variants")
    product = dense_matmul(flat, codes.shape[0], 1, None, scratch, lambda v, u: vector_dequantize(codes, codebooks, flat.shape[1], x.dtype, u))
    y = product.unflatten(0, (len(seen), -1)) * seen[:, None, :, 0]
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], codes.shape[0])
