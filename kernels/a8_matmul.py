"""Triton kernel of `a8_matmul`: 8-bit tensor cores, one product per group, promoted to fp32 under the group's scale.

The weights are the left operand, so that a thread needs two scales per group. Several small programs share a
multiprocessor: while one promotes, the tensor core is another's.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Launch settings: `rows` of the weight × `columns` rows of x; `order` tiles of weights share the L2."""

    rows: int
    columns: int
    warps: int
    stages: int
    order: int = 8


# By the rows of x per variant from which a tile is taken. Measured on an H200.
TILES = {2048: Tile(128, 128, 8, 4), 128: Tile(64, 128, 4, 4), 64: Tile(64, 64, 4, 4), 32: Tile(64, 32, 4, 4), 0: Tile(64, 16, 4, 4)}


@triton.jit
def place(tile, tall, wide, ORDER: tl.constexpr):
    """(tile of weights, tile of x) number `tile`: ORDER tiles of weights at a time, all tiles of x for them."""
    first = tile // (ORDER * wide) * ORDER
    height = tl.minimum(tall - first, ORDER)
    at = tile % (ORDER * wide)
    return first + at % height, at // height


@triton.jit
def _correction(p_zeros, p_sums, n, m, group, wanted, end, groups, stride_zn, stride_zg):
    """int32 [n, m]: (128 - zero) of the group times the sums of x over it, 0 for rows that are not wanted."""
    zero = tl.load(p_zeros + n.to(tl.int64) * stride_zn + group * stride_zg, mask=wanted, other=128).to(tl.int32)
    total = tl.load(p_sums + m.to(tl.int64) * groups + group, mask=m < end, other=0)
    return (128 - zero)[:, None] * total[None, :]


@triton.jit
def rank_one(p_shift, p_wsum, m, end, variant, held, N):
    """f32 [n, m]: what rows of x rounded about a point of their own add, that point times the sum of the weight's row."""
    shift = tl.load(p_shift + m, mask=m < end, other=0)
    return tl.load(p_wsum + variant.to(tl.int64) * N + held)[:, None] * shift[None, :]


@triton.jit
def _a8_kernel(
    d_x, d_w, d_u, p_y, p_x_scale, p_scales, p_bias, p_zeros, p_sums, p_eps, p_shift, p_wsum, rows, variants, N, K, groups, stride_zn, stride_zg,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    OUT: tl.constexpr, ASYM: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, NOISE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(rows, COLUMNS)
    down, along = place(tl.program_id(0), tl.cdiv(N, ROWS), wide * variants, ORDER)
    variant = along // wide
    row = variant * rows + along % wide * COLUMNS
    end = (variant + 1) * rows
    n = down * ROWS + tl.arange(0, ROWS)
    m = row + tl.arange(0, COLUMNS)
    p_scale = p_scales + ((0 if NOISE else variant.to(tl.int64) * N) + tl.minimum(n, N - 1)) * groups
    eps = tl.load(p_eps + variant) if NOISE else 0.0
    acc = tl.zeros((ROWS, COLUMNS), OUT if WHOLE else tl.float32)
    for k in tl.range(0, K, DEPTH, num_stages=STAGES):
        w = d_w.load([down * ROWS, k])
        x = d_x.load([row, k]).T
        if WHOLE:
            acc = tl.dot(w, x, acc, out_dtype=OUT)
        else:
            product = tl.dot(w, x, out_dtype=OUT)
            if ASYM:
                wanted = (n < N) & (k % GROUP == 0)
                product += _correction(p_zeros, p_sums, n, m, k // GROUP, wanted, end, groups, stride_zn, stride_zg)
            scale = tl.load(p_scale + k // GROUP)
            acc += product.to(tl.float32) * scale[:, None]
            if NOISE:
                acc += tl.dot(d_u.load([down * ROWS, k]), x, out_dtype=OUT).to(tl.float32) * (scale * eps)[:, None]
    if WHOLE and ASYM:
        acc += _correction(p_zeros, p_sums, n, m, 0, n < N, end, groups, stride_zn, stride_zg)
    y = acc.to(tl.float32)
    if WHOLE:
        y *= tl.load(p_scale)[:, None]
    y *= tl.load(p_x_scale + m, mask=m < end, other=0)[None, :]
    if SHIFT:
        y += rank_one(p_shift, p_wsum, m, end, variant, tl.minimum(n, N - 1), N)
    if BIAS:
        y += tl.load(p_bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < end)[None, :]
    tl.store(p_y + m.to(tl.int64)[None, :] * N + n[:, None], y.to(p_y.dtype.element_ty), mask=mask)


def choose_tile(rows: int) -> Tile:
    """The launch for `rows` rows of x per variant."""
    return next(tile for least, tile in TILES.items() if rows >= least)


def _aligned(matrix: Tensor) -> Tensor:
    """`matrix` [R, K] in rows that begin at multiples of 16 bytes: itself, or a copy."""
    octets = matrix.view(torch.int8)
    if matrix.shape[1] % 16:
        return pad(octets, (0, -matrix.shape[1] % 16)).view(matrix.dtype)
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(_aligned(matrix), [rows, columns])


def launch_a8_matmul(
    xq: Tensor, x_scale: Tensor, wq: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype,
    bias: Tensor | None = None, zeros: Tensor | None = None, sums: Tensor | None = None, tile: Tile | None = None,
    noise: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None, shift: Tensor | None = None, wsum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference_a8.a8_matmul` on its device, into `out` if given, `sums` those of `group_sums`; arguments as checked by ops_a8.py.

    noise (u [N, K] of wq's dtype, eps f32 [V]): block v of the rows is multiplied with wq + eps[v]·u; scales [1, N, G] then.
    """
    u, eps = noise or (None, None)
    (count, depth), n, variants = xq.shape, len(wq), len(scales) if eps is None else len(eps)
    y = torch.empty(count, n, dtype=dtype, device=xq.device) if out is None else out
    if not y.numel():
        return y
    rows, one = count // variants, group_size >= depth
    tile = tile or choose_tile(rows)
    grid = (-(-n // tile.rows) * -(-rows // tile.columns) * variants,)
    step = 128 if one else math.gcd(group_size, 128)
    # A third operand takes the shared memory of a stage: as many programs on a multiprocessor as without it.
    stages = tile.stages if noise is None else min(tile.stages, 3)
    d_u = None if u is None else _described(u, tile.rows, step)
    with torch.cuda.device_of(xq):
        _a8_kernel[grid](
            _described(xq, tile.columns, step), _described(wq, tile.rows, step), d_u, y, x_scale, scales, bias, zeros, sums, eps, shift, wsum,
            rows, variants, n, depth, scales.shape[2], *((0, 0) if zeros is None else zeros.stride()),
            GROUP=1 << 30 if one else group_size, ROWS=tile.rows, COLUMNS=tile.columns,
            DEPTH=step, STAGES=stages, ORDER=tile.order, OUT=tl.int32 if xq.dtype == torch.int8 else tl.float32,
            ASYM=zeros is not None, WHOLE=one and xq.dtype == torch.int8 and noise is None, BIAS=bias is not None,
            NOISE=noise is not None, SHIFT=shift is not None, num_warps=tile.warps,
        )  # fmt: skip
    return y
