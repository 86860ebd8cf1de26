"""Triton kernel of `a8_matmul` from packed codes of 4 or 8 bits: the weights go from their words into the tensor core's registers.

A mask makes four signed bytes out of a word, 16·(q − 8) of every other nibble, or q − 128; five instructions make four e4m3 numbers
2⁻⁹·(q − 8). No weight in memory, no shared memory for it. The columns of x come in the order of those bytes (a8_rows, `order`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qzo_kernels.a8_matmul import place, rank_one
from qzo_kernels.a8_rows import launch_group_sums
from qzo_kernels.pack import TILE
from qzo_kernels.perturb import launch_perturb
from qzo_kernels.reference_a8 import row_sums

_FACTOR = {(False, 4): 0.0625, (False, 8): 1.0, (True, 4): 512.0, (True, 8): 1.0}  # by (fp8, bits): over what the product is of
# Each asm makes four neighbouring elements, the bytes of one register, of one word given four times over.
# (word & mask) ^ flip:
_AND_XOR = tl.constexpr("lop3.b32 $0, $1, $5, $9, 0x6A;")
# e4m3 bits of 2⁻⁹·(q − 8) for the nibbles q in the low (odd: high) halves of the bytes: from 8 on q − 8, below the sign and 8 − q.
_E4M3 = """{{ .reg .b32 g, d, m;
shr.b32 g, $1, {shift}; lop3.b32 g, g, 0x0F0F0F0F, 0x08080808, 0x6A; sub.u32 d, 0x90909090, g;
shl.b32 m, $1, {sign}; prmt.b32 m, m, m, 0xBA98; lop3.b32 $0, g, d, m, 0xE4; }}"""
_EVEN = tl.constexpr(_E4M3.format(shift=0, sign=4))
_ODD = tl.constexpr(_E4M3.format(shift=4, sign=0))


@triton.jit
def _four(w):
    """[..., 2, 2]: each element of w four times."""
    return tl.join(tl.join(w, w), tl.join(w, w))


@triton.jit
def _byte(w):
    """int32 [..., 2, 2]: the bytes of int32 [...], lowest first."""
    return tl.join(tl.join(w, w >> 16), tl.join(w >> 8, w >> 24)) & 255


@triton.jit
def _signed(w, MASK: tl.constexpr, FLIP: tl.constexpr, ASM: tl.constexpr):
    """int8 [..., 2, 2]: the bytes of (w & MASK) ^ FLIP."""
    if ASM:
        four = _four(w)
        mask, flip = tl.full(four.shape, MASK, tl.int32), tl.full(four.shape, FLIP, tl.int32)
        return tl.inline_asm_elementwise(_AND_XOR, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [four, mask, flip], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return _byte((w & MASK) ^ FLIP).to(tl.int8)


@triton.jit
def _small(w, PART: tl.constexpr, ASM: tl.constexpr):
    """e4m3 [..., 2, 2]: 2⁻⁹·(q − 8) of the even (PART 0) or the odd nibbles."""
    if ASM:
        return tl.inline_asm_elementwise(_ODD if PART else _EVEN, "=r,r,r,r,r", [_four(w)], dtype=tl.float8e4nv, is_pure=True, pack=4)
    else:
        return (((_byte(w) >> (4 * PART)) & 15).to(tl.float32) * 0.001953125 - 0.015625).to(tl.float8e4nv)


@triton.jit
def _weights(d_w, row, block, BITS: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """[ROWS, 128] of a block: 16·(q − 8) or q − 128 as int8; 2⁻⁹·(q − 8), or the bytes themselves, as e4m3."""
    w = tl.reshape(d_w.load([row, block * (4 * BITS)]), (ROWS, 4, BITS))
    w = tl.reshape(tl.permute(w, (0, 2, 1)), (ROWS, 4 * BITS))
    if BITS == 4:
        if FP8:
            q = tl.join(_small(w, 0, ASM), _small(w, 1, ASM))
        else:
            q = tl.join(_signed(w << 4, -252645136, -2139062144, ASM), _signed(w, -252645136, -2139062144, ASM))  # 0xF0F0F0F0, 0x80808080
        q = tl.permute(tl.reshape(q, (ROWS, 4, 4, 4, 2)), (0, 1, 4, 2, 3))
    elif FP8:
        q = _signed(w, -1, 0, ASM).to(tl.float8e4nv, bitcast=True)
    else:
        q = _signed(w, -1, -2139062144, ASM)
    return tl.reshape(q, (ROWS, 128))


@triton.jit
def _zero_part(p_zeros, p_sums, held, m, end, group, groups, stride_zn, stride_zg, BITS: tl.constexpr, FP8: tl.constexpr):
    """[n, m]: what the middle of the range, subtracted in place of the zero point, leaves out of a group's product."""
    away = (1 << (BITS - 1)) - tl.load(p_zeros + held * stride_zn + group * stride_zg).to(tl.int32)
    total = tl.load(p_sums + m.to(tl.int64) * groups + group, mask=m < end, other=0)
    if FP8:
        return away[:, None].to(tl.float32) * (total * 0.001953125)[None, :]
    return (away * (16 if BITS == 4 else 1))[:, None] * total[None, :]


@triton.jit
def _add(
    acc, w, d_x, scale, p_zeros, p_sums, held, row, end, block, groups, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, ASYM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The block's product with the rows of x from `row` on, added to acc [n, m]."""
    x = d_x.load([row, block * 128]).T
    if WHOLE:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    else:
        product = tl.dot(w, x, out_dtype=tl.float32 if FP8 else tl.int32)
        if ASYM:
            if block * 128 % GROUP == 0:
                m = row + tl.arange(0, COLUMNS)
                product += _zero_part(p_zeros, p_sums, held, m, end, block * 128 // GROUP, groups, stride_zn, stride_zg, BITS, FP8)
        acc += product.to(tl.float32) * scale[:, None]
    return acc


@triton.jit
def _store(
    acc, p_y, p_x_scale, p_bias, p_shift, p_wsum, scale, p_zeros, p_sums, n, N, held, row, end, variant, groups, stride_zn, stride_zg, factor,
    BITS: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, ASYM: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    m = row + tl.arange(0, COLUMNS)
    if WHOLE:
        if ASYM:
            acc += _zero_part(p_zeros, p_sums, held, m, end, 0, groups, stride_zn, stride_zg, BITS, FP8)
        y = acc.to(tl.float32) * scale[:, None]
    else:
        y = acc
    y *= (tl.load(p_x_scale + m, mask=m < end, other=0) * factor)[None, :]
    if SHIFT:
        y += rank_one(p_shift, p_wsum, m, end, variant, held, N)
    if BIAS:
        y += tl.load(p_bias + held).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < end)[None, :]
    tl.store(p_y + m.to(tl.int64)[None, :] * N + n[:, None], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _packed_kernel(
    d_x, d_w, p_y, p_x_scale, p_scales, p_bias, p_zeros, p_sums, p_shift, p_wsum,
    rows, variants, N, K, groups, stride_zn, stride_zg, factor,
    BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, ORDER: tl.constexpr, ASYM: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr,
    ASM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(rows, COLUMNS * PARTS)
    down, along = place(tl.program_id(0), tl.cdiv(N, ROWS), wide * variants, ORDER)
    variant = along // wide
    row = variant * rows + along % wide * (COLUMNS * PARTS)
    end = (variant + 1) * rows
    n = down * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(n, N - 1)
    p_scale = p_scales + (variant.to(tl.int64) * N + held) * groups
    a = tl.zeros((ROWS, COLUMNS), tl.int32 if WHOLE else tl.float32)
    b = a
    scale = tl.zeros((ROWS,), tl.float32)
    if WHOLE:
        scale = tl.load(p_scale)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        w = _weights(d_w, down * ROWS, block, BITS, ROWS, FP8, ASM)
        if not WHOLE:
            scale = tl.load(p_scale + block * 128 // GROUP)
        a = _add(a, w, d_x, scale, p_zeros, p_sums, held, row, end, block, groups, stride_zn, stride_zg, BITS, GROUP, WHOLE, COLUMNS, ASYM, FP8)
        if PARTS == 2:
            b = _add(
                b, w, d_x, scale, p_zeros, p_sums, held, row + COLUMNS, end, block, groups, stride_zn, stride_zg,
                BITS, GROUP, WHOLE, COLUMNS, ASYM, FP8,
            )  # fmt: skip
    _store(
        a, p_y, p_x_scale, p_bias, p_shift, p_wsum, scale, p_zeros, p_sums, n, N, held, row, end, variant, groups, stride_zn, stride_zg, factor,
        BITS, WHOLE, COLUMNS, ASYM, BIAS, FP8, SHIFT,
    )  # fmt: skip
    if PARTS == 2:
        _store(
            b, p_y, p_x_scale, p_bias, p_shift, p_wsum, scale, p_zeros, p_sums, n, N, held, row + COLUMNS, end, variant,
            groups, stride_zn, stride_zg, factor, BITS, WHOLE, COLUMNS, ASYM, BIAS, FP8, SHIFT,
        )  # fmt: skip


class Tile(NamedTuple):
    """Launch settings: `parts` products of `columns` rows of x with 64 rows of the weight per four warps.

    `order` tiles of weights share the L2.
    """

    columns: int
    parts: int
    warps: int
    stages: int
    order: int = 16


# By the rows of x per variant from which a tile is taken, and the one for many such tiles. Measured on an H200.
TILES = {128: Tile(128, 1, 4, 3, 64), 64: Tile(64, 1, 4, 4), 32: Tile(32, 1, 4, 4), 0: Tile(16, 1, 4, 4)}
_WIDE = Tile(128, 2, 4, 3)
_MANY = 1000  # tiles of _WIDE, two on a multiprocessor: enough that the last round of them does not matter


def choose_tile(rows: int, n: int, variants: int) -> Tile:
    """The launch for `rows` rows of x in each of the variants and n rows of the weight."""
    if -(-n // 64) * (rows // 256) * variants >= _MANY:
        return _WIDE
    return next(tile for least, tile in TILES.items() if rows >= least)


def launch_a8_packed(
    xq: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int,
    dtype: torch.dtype, bias: Tensor | None = None, noise=None, tile: Tile | None = None,
    shift: Tensor | None = None, csum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] of xq [M, whole blocks] and x_scale [M] from launch_quantize_rows(…, order=bits): `ops_a8.quant_matmul_a8`'s product.

    codes, scales f32 [N, G], zeros and `noise` as there, group_size a multiple of 128 or at least `cols`; ValueError for others.
    With shift f32 [M] of asymmetric rows, csum int32 [N, G] is `reference_a8.code_sums`.
    """
    if group_size < cols and group_size % TILE:
        raise ValueError(f"group_size = {group_size}: packed codes meet 8-bit rows in groups of multiples of {TILE}, or whole rows")
    (n, groups), fp8 = scales.shape, xq.dtype != torch.int8
    variants = 1 if noise is None else len(noise.eps)
    rows = len(xq) // variants
    y = torch.empty(len(xq), n, dtype=dtype, device=xq.device)
    if not y.numel():
        return y
    if noise is not None:
        # Signs made in the kernel would take the registers of its third program on a multiprocessor.
        scales = launch_perturb(scales, *noise)
    wsum = None if shift is None else row_sums(scales, csum)
    # A group of whole rows spans the padding too, which is 0.
    sums = None if zeros is None else launch_group_sums(xq, group_size if group_size < cols else xq.shape[1])
    tile = tile or choose_tile(rows, n, variants)
    tall = 64 * tile.warps // 4
    grid = (-(-n // tall) * -(-rows // (tile.columns * tile.parts)) * variants,)
    with torch.cuda.device_of(xq):
        _packed_kernel[grid](
            TensorDescriptor.from_tensor(xq, [tile.columns, TILE]), TensorDescriptor.from_tensor(codes, [tall, 4 * bits]),
            y, x_scale, scales, bias, zeros, sums, shift, wsum,
            rows, variants, n, cols, groups, *((0, 0) if zeros is None else zeros.stride()), _FACTOR[fp8, bits],
            BITS=bits, GROUP=min(group_size, 1 << 30), WHOLE=group_size >= cols and not fp8, ROWS=tall, COLUMNS=tile.columns,
            PARTS=tile.parts, STAGES=tile.stages, ORDER=tile.order, ASYM=zeros is not None,
            BIAS=bias is not None, FP8=fp8, ASM=xq.is_cuda, SHIFT=shift is not None, num_warps=tile.warps,
        )  # fmt: skip
    return y
