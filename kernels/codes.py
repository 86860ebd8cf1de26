"""Triton kernel of `update_codes_`: one pass over codes as pack.tile_codes lays them out, all noise made in registers.

A thread holds words v, b + v, 2b + v and 3b + v of a block. Fields p of these four are the eight neighbouring columns that
begin at 8·(b·p + v): what one Philox call of normals and two of uniforms serve. So no value changes threads, and
everything below is [lanes], eight tensors of it for eight columns.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels import noise
from qzo_kernels.pack import TILE
from qzo_kernels.reference_noise import normal_table

LANES = 128  # of a program: one per thread, so that Triton has no layout to choose
_BLOCKS = 4  # blocks of 128 columns that a program reads of a row, at most


@triton.jit
def uniforms(seed, step, direction, uid, row, eight, cols, stream: tl.constexpr):
    """Eight int32 like `row`, uniform in [0, 2²⁴): columns 8·eight … 8·eight + 7."""
    four = row * tl.cdiv(cols, 4) + eight * 2
    w = noise.words(seed, four, uid, step, direction, stream) + noise.words(seed, four + 1, uid, step, direction, stream)
    return [(x >> 8).to(tl.int32) for x in w]


@triton.jit
def quantized_normals(p_table, seed, step, direction, uid, row, eight, cols, stream: tl.constexpr, LEVELS: tl.constexpr):
    """Eight int32 like `row`, in −LEVELS … LEVELS: columns 8·eight … of `reference_codes.quantized_normal`."""
    w = noise.words(seed, row * tl.cdiv(cols, 8) + eight, uid, step, direction, 0)
    u = uniforms(seed, step, direction, uid, row, eight, cols, stream)
    return [_level(p_table, w[i // 2] >> (16 * (i % 2)), u[i], LEVELS) for i in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def _level(p_table, w, u, LEVELS: tl.constexpr):
    n = tl.load(p_table + (w & 0xFFFF).to(tl.int32)).to(tl.int32) * LEVELS
    level = (n >> 14) + (u < (n & 0x3FFF) << 10).to(tl.int32)
    return tl.minimum(tl.maximum(level, -LEVELS), LEVELS)


@triton.jit
def _rounded(x, u, LIMIT: tl.constexpr):
    """int32: `reference_codes.rounded` of f32 x by uniforms u. Every operation on floats is exact."""
    size = tl.abs(x)
    size = tl.where(size < LIMIT, size, LIMIT)
    whole = size.to(tl.int32)
    part = ((size - whole.to(tl.float32)) * 16777216.0).to(tl.int32)
    whole += (u < part).to(tl.int32)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def _plain(
    q, p_coefs, p_table, seed, step, uid, row, eight, cols,
    TOP: tl.constexpr, LEVELS: tl.constexpr, DIRECTIONS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Eight codes after one step: every direction's part rounded on its own, the sum kept in range."""
    at = [x for x in q]
    for i in range(DIRECTIONS):
        c = tl.load(p_coefs + i)
        if c != 0:
            z = quantized_normals(p_table, seed, step, i, uid, row, eight, cols, STREAM, LEVELS)
            u = uniforms(seed, step, i, uid, row, eight, cols, 3)
            at = [at[k] - _rounded(c * z[k].to(tl.float32), u[k], 32768.0) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
    return [tl.minimum(tl.maximum(x, 0), TOP) for x in at]


@triton.jit
def _fed_back(
    at, p_coefs, p_table, seed, step, uid, row, eight, cols,
    TOP: tl.constexpr, LEVELS: tl.constexpr, DIRECTIONS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Eight positions, code·2¹⁶ + residual, after one step."""
    g = [tl.zeros_like(row).to(tl.float32) for x in at]
    for i in range(DIRECTIONS):
        c = tl.load(p_coefs + i)
        if c != 0:
            z = quantized_normals(p_table, seed, step, i, uid, row, eight, cols, STREAM, LEVELS)
            g = [g[k] + c * z[k].to(tl.float32) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
    u = uniforms(seed, step, 0, uid, row, eight, cols, 3)
    at = [at[k] - _rounded(g[k] * 65536.0, u[k], 1073741824.0) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
    return [tl.minimum(tl.maximum(x, -32768), TOP * 65536 + 32767) for x in at]


@triton.jit
def _load_residual(p, col, cols, inside, ALIGNED: tl.constexpr):
    """Eight int32 of the int16 at p; 0 from column `cols` on."""
    if ALIGNED:
        p = p.to(tl.pointer_type(tl.int64))
        a = tl.load(p, mask=inside & (col < cols), other=0)
        b = tl.load(p + 1, mask=inside & (col + 4 < cols), other=0)
        return [(((a, b)[k // 4] << (48 - 16 * (k % 4))) >> 48).to(tl.int32) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
    else:
        return [tl.load(p + k, mask=inside & (col + k < cols), other=0).to(tl.int32) for k in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def _store_residual(p, r, col, cols, inside, ALIGNED: tl.constexpr):
    if ALIGNED:
        p = p.to(tl.pointer_type(tl.int64))
        w = [(r[k] & 0xFFFF) | (r[k + 1] << 16) for k in (0, 2, 4, 6)]
        w = [(w[k].to(tl.int64) & 0xFFFFFFFF) | (w[k + 1].to(tl.int64) << 32) for k in (0, 2)]
        tl.store(p, w[0], mask=inside & (col < cols))
        tl.store(p + 1, w[1], mask=inside & (col + 4 < cols))
    else:
        for k in tl.static_range(8):
            tl.store(p + k, r[k].to(tl.int16), mask=inside & (col + k < cols))


@triton.jit(do_not_specialize=["uid"])
def _update_codes_kernel(
    p_codes, p_residual, p_state, p_coefs, p_table, rows, cols, words, uid, BITS: tl.constexpr, LEVELS: tl.constexpr,
    STEPS: tl.constexpr, DIRECTIONS: tl.constexpr, STREAM: tl.constexpr, FEEDBACK: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = 2 if BITS == 3 else BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    across = tl.cdiv(cols, 128 * BLOCKS)
    lane = tl.arange(0, ROWS * BLOCKS * B)
    v = lane % B
    block = tl.program_id(0) % across * BLOCKS + lane // B % BLOCKS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + lane // (B * BLOCKS)
    inside = (row < rows) & (block * 128 < cols)
    seed = tl.load(p_state)
    first = tl.load(p_state + 1)
    p_word = p_codes + row * words + block * (4 * BITS)
    old = [tl.load(p_word + t * B + v, mask=inside, other=0) for t in (0, 1, 2, 3)]
    new = [tl.zeros_like(x) for x in old]
    if BITS == 3:
        # Bit m of a half of word 8 + t is the high bit of a column of eight m.
        old_high = [tl.load(p_word + 8 + t, mask=inside, other=0) for t in (0, 1, 2, 3)]
        new_high = [tl.zeros_like(x) for x in old]
    for p in range(16 // B):
        m = p * B + v
        eight = block * 16 + m
        col = eight * 8
        q = [(old[k // 2] >> (p * B + 16 * (k % 2))) & ((1 << B) - 1) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        if BITS == 3:
            q = [q[k] | (((old_high[k // 2] >> (m + 16 * (k % 2))) & 1) << 2) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        if FEEDBACK:
            p_r = p_residual + row * cols + col
            r = _load_residual(p_r, col, cols, inside, ALIGNED)
            at = [q[k] * 65536 + r[k] for k in (0, 1, 2, 3, 4, 5, 6, 7)]
            for s in range(STEPS):
                p_c = p_coefs + s * DIRECTIONS
                at = _fed_back(at, p_c, p_table, seed, first + s, uid, row, eight, cols, TOP, LEVELS, DIRECTIONS, STREAM)
            q = [(x + 32768) >> 16 for x in at]
            _store_residual(p_r, [at[k] - (q[k] << 16) for k in (0, 1, 2, 3, 4, 5, 6, 7)], col, cols, inside, ALIGNED)
        else:
            for s in range(STEPS):
                p_c = p_coefs + s * DIRECTIONS
                q = _plain(q, p_c, p_table, seed, first + s, uid, row, eight, cols, TOP, LEVELS, DIRECTIONS, STREAM)
        q = [tl.where(col + k < cols, q[k], 0) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        low = [x & ((1 << B) - 1) for x in q]
        new = [new[t] | ((low[2 * t] | (low[2 * t + 1] << 16)) << (p * B)) for t in (0, 1, 2, 3)]
        if BITS == 3:
            new_high = [new_high[t] | ((q[2 * t] >> 2 | (q[2 * t + 1] >> 2 << 16)) << m) for t in (0, 1, 2, 3)]
    for t in tl.static_range(4):
        tl.store(p_word + t * B + v, new[t], mask=inside)
    if BITS == 3:
        # The two lanes of a block hold the even and the odd bits of the same words.
        for t in tl.static_range(4):
            both = tl.sum(tl.reshape(new_high[t], (ROWS * BLOCKS, 2)), 1)
            at_high = tl.reshape(tl.broadcast_to(both[:, None], (ROWS * BLOCKS, 2)), (ROWS * BLOCKS * 2,))
            tl.store(p_word + 8 + t, at_high, mask=inside & (v == 0))


@functools.cache
def normals_on(device: torch.device) -> Tensor:
    """`reference_noise.normal_table` on a device, copied there once."""
    return normal_table().to(device)


def shape_of_blocks(bits: int, cols: int) -> tuple[int, int]:
    """(rows, blocks of 128 columns) of packed codes that the LANES of a program take."""
    blocks = min(_BLOCKS, triton.next_power_of_2(triton.cdiv(cols, TILE)))
    return LANES // ((2 if bits == 3 else bits) * blocks), blocks


def launch_update_codes(
    codes: Tensor, residual: Tensor | None, state: Tensor, coefs: Tensor, uid: int, bits: int, cols: int, noise_bits: int, stream: int
) -> None:
    """`reference_codes.update_codes_` on the codes' device; arguments as checked by ops_codes.py."""
    rows, words = codes.shape
    height, blocks = shape_of_blocks(bits, cols)
    tiles = triton.cdiv(rows, height) * triton.cdiv(cols, TILE * blocks)
    aligned = residual is not None and cols % 4 == 0 and residual.data_ptr() % 8 == 0
    with torch.cuda.device_of(codes):
        _update_codes_kernel[(tiles,)](
            codes, residual, state, coefs, normals_on(codes.device), rows, cols, words, noise.signed(uid),
            BITS=bits, LEVELS=(1 << (noise_bits - 1)) - 1, STEPS=coefs.shape[0], DIRECTIONS=coefs.shape[1], STREAM=stream,
            FEEDBACK=residual is not None, ALIGNED=aligned, ROWS=height, BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
