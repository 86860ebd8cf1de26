"""Triton kernels of QuZO's forwards: the noise on codes as 8-bit numbers, and weights dequantized under it.

With 8-bit activations the sum of a group is s·(Σ xq·(q − zero) + eps·Σ xq·u): two integer products in one pass over x.
All noise is made in registers, eight neighbouring columns per lane, from a state that only the device reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels import noise
from qzo_kernels.a8_matmul import launch_a8_matmul
from qzo_kernels.a8_rows import launch_group_sums, launch_quantize_rows, launch_unpack
from qzo_kernels.checks import weight_in
from qzo_kernels.codes import LANES, normals_on, quantized_normals, shape_of_blocks
from qzo_kernels.pack import TILE

_ACROSS = 32  # lanes along a row at most: a warp writes 256 bytes of it


@triton.jit
def _eight(x):
    """[LANES, 8] of eight [LANES], in order."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], 8))


@triton.jit
def _drawn(p_table, p_state, uid, row, eight, cols, STREAM: tl.constexpr, LEVELS: tl.constexpr):
    """Eight int32 like `row`: `quantized_normals` of the state (seed, step, direction) at p_state."""
    seed, step, direction = tl.load(p_state), tl.load(p_state + 1), tl.load(p_state + 2)
    return quantized_normals(p_table, seed, step, direction, uid, row, eight, cols, STREAM, LEVELS)


@triton.jit
def _e4m3(u):
    """The bits of int32 −15 … 15 as e4m3, which holds them: those of fp32 but for the bias of the exponent."""
    size = tl.abs(u).to(tl.float32).to(tl.int32, bitcast=True) >> 20
    return tl.maximum(size - 960, 0) | ((u >> 24) & 0x80)


@triton.jit(do_not_specialize=["uid"])
def _noise_kernel(
    p_out, p_table, p_state, rows, cols, uid,
    LEVELS: tl.constexpr, STREAM: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    along = tl.cdiv(cols, 8 * ACROSS)
    lane = tl.arange(0, ROWS * ACROSS)
    row = (tl.program_id(0) // along).to(tl.int64) * ROWS + lane // ACROSS
    eight = tl.program_id(0) % along * ACROSS + lane % ACROSS
    u = _drawn(p_table, p_state, uid, row, eight, cols, STREAM, LEVELS)
    if FP8:
        u = [_e4m3(x) for x in u]
    col = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(p_out + row[:, None] * cols + col, _eight(u).to(tl.int8), mask=(row < rows)[:, None] & (col < cols))


def launch_code_noise(out: Tensor, state: Tensor, uid: int, noise_bits: int, stream: int) -> None:
    """`reference_codes.quantized_normal` of state int64 [3] or [1, 3] into `out` [N, K], int8 or e4m3 (noise_bits ≤ 5)."""
    rows, cols = out.shape
    if not out.numel():
        return
    across = min(_ACROSS, triton.next_power_of_2(triton.cdiv(cols, 8)))
    grid = (triton.cdiv(rows, LANES // across) * triton.cdiv(cols, 8 * across),)
    with torch.cuda.device_of(out):
        _noise_kernel[grid](
            out.view(torch.int8), normals_on(out.device), state, rows, cols, noise.signed(uid), LEVELS=(1 << (noise_bits - 1)) - 1,
            STREAM=stream, FP8=out.dtype != torch.int8, ROWS=LANES // across, ACROSS=across, num_warps=LANES // 32,
        )  # fmt: skip


@triton.jit
def _grouped(p, row, col, cols, inside, stride_n, stride_g, GROUP: tl.constexpr):
    """Eight values like `row` of the groups of columns col … col + 7 of [N, G] at p."""
    p += row * stride_n
    if GROUP % 8 == 0:
        one = tl.load(p + col // GROUP * stride_g, mask=inside & (col < cols), other=0)
        return [one, one, one, one, one, one, one, one]
    else:
        return [tl.load(p + (col + k) // GROUP * stride_g, mask=inside & (col + k < cols), other=0) for k in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit(do_not_specialize=["uid"])
def _noisy_weight_kernel(
    p_out, p_codes, p_scales, p_zeros, p_table, p_state, p_eps, rows, cols, words, groups, stride_zn, stride_zg, uid,
    BITS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = 2 if BITS == 3 else BITS
    across = tl.cdiv(cols, 128 * BLOCKS)
    # As in codes.py: a lane holds words v, B + v, 2B + v, 3B + v of a block, whose fields p are eight neighbouring columns.
    lane = tl.arange(0, ROWS * BLOCKS * B)
    v = lane % B
    block = tl.program_id(0) % across * BLOCKS + lane // B % BLOCKS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + lane // (B * BLOCKS)
    inside = (row < rows) & (block * 128 < cols)
    eps = tl.load(p_eps)
    p_word = p_codes + row * words + block * (4 * BITS)
    low = [tl.load(p_word + t * B + v, mask=inside, other=0) for t in (0, 1, 2, 3)]
    if BITS == 3:
        high = [tl.load(p_word + 8 + t, mask=inside, other=0) for t in (0, 1, 2, 3)]
    for p in range(16 // B):
        m = p * B + v
        eight = block * 16 + m
        col = eight * 8
        q = [(low[k // 2] >> (p * B + 16 * (k % 2))) & ((1 << B) - 1) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        if BITS == 3:
            q = [q[k] | (((high[k // 2] >> (m + 16 * (k % 2))) & 1) << 2) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        if p_zeros is None:
            q = [x - (1 << (BITS - 1)) for x in q]
        else:
            zero = _grouped(p_zeros, row, col, cols, inside, stride_zn, stride_zg, GROUP)
            q = [q[k] - zero[k].to(tl.int32) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        u = _drawn(p_table, p_state, uid, row, eight, cols, 1, LEVELS)
        scale = _grouped(p_scales, row, col, cols, inside, groups, 1, GROUP)
        w = [(q[k].to(tl.float32) + u[k].to(tl.float32) * eps) * scale[k] for k in (0, 1, 2, 3, 4, 5, 6, 7)]
        at = col[:, None] + tl.arange(0, 8)[None, :]
        tl.store(p_out + row[:, None] * cols + at, _eight(w).to(p_out.dtype.element_ty), mask=inside[:, None] & (at < cols))


def launch_noisy_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor,
    state: Tensor, eps: Tensor, uid: int, noise_bits: int,
) -> None:  # fmt: skip
    """`reference_noisy.noisy_weight` of one variant, state int64 [1, 3] and eps f32 [1], rounded once into `out` [N, K]."""
    rows, cols = out.shape
    if not out.numel():
        return
    height, blocks = shape_of_blocks(bits, cols)
    grid = (triton.cdiv(rows, height) * triton.cdiv(cols, TILE * blocks),)
    with torch.cuda.device_of(out):
        _noisy_weight_kernel[grid](
            out, codes, scales, zeros, normals_on(out.device), state, eps, rows, cols, codes.shape[1], scales.shape[1],
            *((0, 0) if zeros is None else zeros.stride()), noise.signed(uid), BITS=bits, GROUP=min(group_size, 1 << 30),
            LEVELS=(1 << (noise_bits - 1)) - 1, ROWS=height, BLOCKS=blocks, num_warps=LANES // 32, enable_fp_fusion=False,
        )  # fmt: skip


def launch_noisy_a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, kind: str, bias: Tensor | None,
    state: Tensor, eps: Tensor, uid: int, noise_bits: int, paired: bool, scratch: Tensor | None,
) -> Tensor:  # fmt: skip
    """`reference_noisy.noisy_matmul_a8` on its device, sums in fp32. paired: variants 2i and 2i + 1 are of one direction.

    scratch uint8: 2·N·K bytes, for the codes as 8-bit weights and for the noise of one direction.
    """
    rows, cols = codes.shape[0], x.shape[1]
    xq, x_scale = launch_quantize_rows(x, kind)
    if scratch is None:
        scratch = torch.empty(2 * rows * cols, dtype=torch.uint8, device=x.device)
    wq, u = weight_in(scratch, xq.dtype, (2 * rows, cols), x).chunk(2)
    launch_unpack(codes, zeros, bits, group_size, cols, wq)
    if bits != 8:
        zeros = None  # subtracted already
    sums = None if zeros is None else launch_group_sums(xq, group_size)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    each = 2 if paired else 1
    height = len(x) // len(eps)
    for i in range(0, len(eps), each):
        of = slice(i * height, (i + each) * height)
        launch_code_noise(u, state[i], uid, noise_bits, 1)
        launch_a8_matmul(
            xq[of], x_scale[of], wq, scales[None], group_size, x.dtype, bias, zeros, None if sums is None else sums[of],
            noise=(u, eps[i : i + each]), out=y[of],
        )  # fmt: skip
    return y
