"""Triton kernel of `vector_dequantize`: codes of vectors to U [N, K], bound by the bytes that it writes.

The 4 KB of a codebook of 256 vectors stay in the first cache, the megabyte of 65,536 in the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels.reference_vectors import WIDTH, code_dtype

_COLUMNS, _ELEMENTS = 512, 2048  # per program, at most


@triton.jit
def _vectors_kernel(
    p_out, p_codes, p_books, rows, cols, stride, COUNT: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(cols, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * stride + (col // VECTOR)[None, :] * COUNT
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for c in tl.static_range(COUNT):
        code = tl.load(p_codes + at + c, mask=inside, other=0).to(tl.int32) & (SIZE - 1)
        total += tl.load(p_books + (c * SIZE + code) * VECTOR + (col % VECTOR)[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + row[:, None] * cols + col[None, :], total.to(p_out.dtype.element_ty), mask=inside)


def launch_vector_dequantize(codes: Tensor, codebooks: Tensor, out: Tensor) -> None:
    """`reference_vectors.vector_dequantize` into `out` on its device; arguments as checked by ops_vectors.py."""
    rows, cols = out.shape
    count, size, _ = codebooks.shape
    plain = codes.view(code_dtype(size))
    width = min(_COLUMNS, triton.next_power_of_2(cols))
    height = min(_ELEMENTS // width, triton.next_power_of_2(rows))
    with torch.cuda.device_of(out):
        _vectors_kernel[(triton.cdiv(rows, height) * triton.cdiv(cols, width),)](
            out, plain, codebooks, rows, cols, plain.shape[1], COUNT=count, SIZE=size, VECTOR=WIDTH, ROWS=height, COLUMNS=width,
        )  # fmt: skip
