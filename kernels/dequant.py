"""Triton kernel of `dequantize`: codes as pack.tile_codes lays them out to weights [N, K], bound by the bytes it writes.

Rademacher noise is made in registers: one Philox call per row of a tile. The levels of a codebook are fetched by code; the table's
64 bytes (4 bits) stay in the first cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels import noise as noise_functions
from qzo_kernels.fields import differences
from qzo_kernels.pack import TILE

_WIDTH = 1024  # columns per program at most: a multiple of the 128 columns of a block of codes
_ELEMENTS = 4096  # per program


@triton.jit
def _words(p_codes, row, inside, words, block, blocks, FIRST: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """int32 [len(row)·BLOCKS, (v, t)]: the words of a plane of BLOCKS blocks of every row."""
    i = tl.arange(0, BLOCKS * 4 * B)
    at = (block + i // (4 * B)) * (4 * BITS) + FIRST + i % (4 * B)
    mask = inside[:, None] & (block + i // (4 * B) < blocks)[None, :]
    w = tl.load(p_codes + row[:, None] * words + at[None, :], mask=mask, other=0)
    return tl.reshape(tl.permute(tl.reshape(w, (row.shape[0] * BLOCKS, 4, B)), (0, 2, 1)), (row.shape[0] * BLOCKS, 4 * B))


@triton.jit
def spread(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, TIMES: tl.constexpr):
    """[ROWS, WIDTH // TIMES] to [ROWS, WIDTH]: every column repeated TIMES times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, WIDTH // TIMES, TIMES)), (ROWS, WIDTH))


@triton.jit(do_not_specialize=["uid"])
def _dequantize_kernel(
    p_out, p_codes, p_scales, p_zeros, p_codebook, p_state, p_eps, rows, cols, words, groups, stride_zn, stride_zg, uid, floor,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    NOISE: tl.constexpr, RELATIVE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr, CODEBOOK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCKS * 128
    across = tl.cdiv(cols, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * WIDTH
    inside = row < rows
    blocks = tl.cdiv(cols, 128)
    zero: tl.constexpr = ZERO if ZERO >= 0 else 0
    if BITS == 3:
        w = _words(p_codes, row, inside, words, first // 128, blocks, 0, 2, 3, BLOCKS)
        third = _words(p_codes, row, inside, words, first // 128, blocks, 8, 1, 3, BLOCKS)
        q = differences(w, third, zero, 0, 8, 3, DTYPE, ASM)
    else:
        w = _words(p_codes, row, inside, words, first // 128, blocks, 0, BITS, BITS, BLOCKS)
        q = differences(w, w, zero, 0, 16 // BITS, BITS, DTYPE, ASM)
    q = tl.reshape(q, (ROWS, WIDTH)).to(tl.float32)
    if CODEBOOK:
        q = tl.load(p_codebook + q.to(tl.int32))
    # UNIT columns always share a group: one load for all of them.
    unit = first + tl.arange(0, WIDTH // UNIT) * UNIT
    group = unit // GROUP
    held = inside[:, None] & (unit < cols)[None, :]
    scale = tl.load(p_scales + row[:, None] * groups + group[None, :], mask=held)
    if NOISE:
        at = group % 128
        w0, w1, w2, w3 = noise_functions.words(
            tl.load(p_state), row * tl.cdiv(groups, 128) + first // GROUP // 128, uid, tl.load(p_state + 1), tl.load(p_state + 2), 0
        )
        scale = noise_functions.moved(scale, noise_functions.sign(w0, w1, w2, w3, at), tl.load(p_eps), floor, RELATIVE)
    if ZERO < 0:
        zeros = tl.load(p_zeros + row[:, None] * stride_zn + group[None, :] * stride_zg, mask=held).to(tl.float32)
        q -= spread(zeros, ROWS, WIDTH, UNIT)
    w = q * spread(scale, ROWS, WIDTH, UNIT)
    col = first + tl.arange(0, WIDTH)
    tl.store(p_out + row[:, None] * cols + col[None, :], w.to(p_out.dtype.element_ty), mask=inside[:, None] & (col < cols)[None, :])


def launch_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, out: Tensor, noise=None,
    codebook: Tensor | None = None,
) -> None:  # fmt: skip
    """`reference.dequantize` into `out` on its device, under `noise` of one variant; arguments as checked by ops.py."""
    rows, groups = scales.shape
    blocks = min(_WIDTH // TILE, triton.next_power_of_2(triton.cdiv(cols, TILE)))
    width = blocks * TILE
    in_kernel = noise is not None and not noise.gaussian and (groups <= 128 or 128 * group_size % width == 0)
    if noise is not None and not in_kernel:
        from qzo_kernels.perturb import launch_perturb

        scales = launch_perturb(scales, *noise)[0]
    state, eps, uid, floor, relative = noise[:5] if in_kernel else (None, None, 0, 0.0, False)
    middle = 1 << (bits - 1) if codebook is None else 0
    height = min(_ELEMENTS // width, triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, height) * triton.cdiv(cols, width)
    with torch.cuda.device_of(out):
        _dequantize_kernel[(tiles,)](
            out, codes, scales, zeros, codebook, state, eps, rows, cols, codes.shape[1], groups, *((0, 0) if zeros is None else zeros.stride()), noise_functions.signed(uid), floor,
            BITS=bits, GROUP=group_size, ZERO=middle if zeros is None else -1, UNIT=_unit(group_size), ROWS=height, BLOCKS=blocks, NOISE=in_kernel, RELATIVE=relative,
            DTYPE=tl.bfloat16 if out.is_cuda else tl.float32, ASM=out.is_cuda, CODEBOOK=codebook is not None, enable_fp_fusion=False,
        )  # fmt: skip


def _unit(group_size: int) -> int:
    """The largest power of two, at most 32, that divides the group size."""
    return min(32, group_size & -group_size)
