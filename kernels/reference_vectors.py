"""Weights of additive vector codebooks (AQLM, arXiv 2401.06118) in plain PyTorch: the definition of their bits.

    W[n, 8g + j] = scales[n]·U[n, 8g + j],    U[n, 8g + j] = Σ_c codebooks[c, code[n, g, c], j]

The scale is a row's, so it leaves the product: y = (x·Uᵀ)·scales, and one U serves every variant of noise on the scales.
"""

import torch
from torch import Tensor

WIDTH = 8  # columns that one code stands for
_CHUNK = 1 << 22  # weights at a time


def code_dtype(size: int) -> torch.dtype:
    """How codes of codebooks with `size` vectors are stored: 256 or 65536."""
    return {256: torch.uint8, 65536: torch.int16}[size]


def vector_words(cols: int, count: int, size: int) -> int:
    """int32 words for a row's codes."""
    return -(-cols // WIDTH * count * code_dtype(size).itemsize // 4)


def vector_dequantize(codes: Tensor, codebooks: Tensor, cols: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """U [N, cols] of `dtype`: summed in fp32 in the order of the codebooks, rounded once.

    codebooks f16, bf16 or f32 [C, S, 8], S 256 or 65536. codes int32 [N, vector_words]: the bytes of a row's codes [cols/8, C], each
    as unsigned little-endian integer of 8 or 16 bits, then what fills the last word. `out` [N, cols] is filled and returned if given.
    """
    count, size, _ = codebooks.shape
    rows = codes.shape[0]
    table = codebooks.float()
    plain = codes.view(code_dtype(size))[:, : cols // WIDTH * count].unflatten(1, (-1, count))
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device) if out is None else out
    chunk = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, chunk):
        index = plain[start : start + chunk].int() & (size - 1)
        total = table[0][index[..., 0]]
        for c in range(1, count):
            total += table[c][index[..., c]]
        out[start : start + chunk].copy_(total.flatten(1))
    return out


def vector_matmul(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] of x's dtype: (x·Uᵀ)·scales + bias in fp32, rounded once.

    x [M, K]; scales f32 [V, N, 1], as `perturb` gives them: the rows of x, cut into V equal consecutive blocks, see one each.
    """
    products = x.float() @ vector_dequantize(codes, codebooks, x.shape[1], torch.float32).t()
    y = (products.unflatten(0, (len(scales), -1)) * scales[:, None, :, 0]).flatten(0, 1)
    return (y if bias is None else y + bias.float()).to(x.dtype)
