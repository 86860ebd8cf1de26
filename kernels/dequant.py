"""Triton kernel of `dequantize`: packed codes [N, words] to weights [N, K], bound by the bytes it writes."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _spread(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, TIMES: tl.constexpr):
    """[ROWS, WIDTH // TIMES] to [ROWS, WIDTH]: every column repeated TIMES times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, WIDTH // TIMES, TIMES)), (ROWS, WIDTH))


@triton.jit
def _dequantize_kernel(
    p_out, p_codes, p_scales, p_zeros, rows, cols, words, groups, group_size, stride_zn, stride_zg,
    BITS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    across = tl.cdiv(cols, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.program_id(0) % across * WIDTH
    col = first + tl.arange(0, WIDTH)[None, :]
    if BITS == 3:
        PER: tl.constexpr = 8
        # Eight codes are 24 bits from bit 0, 8, 16 or 24 of a word on: they may reach into the next word.
        eight = first // 8 + tl.arange(0, WIDTH // 8)[None, :]
        word = eight * 24 // 32
        shift = (eight * 24 % 32).to(tl.uint32)
        inside = (row < rows) & (word < words)
        packed = tl.load(p_codes + row * words + word, mask=inside).to(tl.uint32, bitcast=True) >> shift
        inside = (row < rows) & (word + 1 < words) & (shift > 8)
        beyond = tl.load(p_codes + row * words + word + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        packed = (packed | (beyond << ((32 - shift) & 31))).to(tl.int32, bitcast=True)
    else:
        PER: tl.constexpr = 32 // BITS
        word = first // PER + tl.arange(0, WIDTH // PER)[None, :]
        packed = tl.load(p_codes + row * words + word, mask=(row < rows) & (word < words))
    q = (packed[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    q = tl.reshape(q, (ROWS, WIDTH))
    # UNIT columns always share a group: one load for all of them.
    unit = first + tl.arange(0, WIDTH // UNIT)[None, :] * UNIT
    group = unit // group_size
    inside = (row < rows) & (unit < cols)
    scale = tl.load(p_scales + row * groups + group, mask=inside)
    zero = tl.load(p_zeros + row * stride_zn + group * stride_zg, mask=inside).to(tl.int32)
    w = (q - _spread(zero, ROWS, WIDTH, UNIT)).to(tl.float32) * _spread(scale, ROWS, WIDTH, UNIT)
    tl.store(p_out + row * cols + col, w.to(p_out.dtype.element_ty), mask=(row < rows) & (col < cols))


def launch_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, out: Tensor
) -> None:
    """`reference.dequantize` into `out` on its device; arguments as checked by ops.py."""
    rows = codes.shape[0]
    width = min(1024, max(16, triton.next_power_of_2(cols)))
    height = min(4096 // width, triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, height) * triton.cdiv(cols, width)
    with torch.cuda.device_of(out):
        _dequantize_kernel[(tiles,)](
            out, codes, scales, zeros, rows, cols, codes.shape[1], scales.shape[1], group_size, *zeros.stride(),
            BITS=bits, UNIT=math.gcd(group_size, 8), ROWS=height, WIDTH=width,
        )  # fmt: skip
