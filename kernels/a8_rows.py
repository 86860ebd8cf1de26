"""Triton kernels around `a8_matmul`: rows of x to 8 bits, packed codes to 8-bit weights, sums of x over groups.

Each is bound by the bytes it moves. `quantize_rows` is compiled without floating-point contraction and equals the reference's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels.pack import TILE
from qzo_kernels.reference_a8 import LARGEST

_WIDTH = 16384  # columns of x that a program holds in registers
_LANES = 128  # one per thread: nothing changes hands between the loads and the stores


@triton.jit
def _magnitude(p_x, col, cols):
    """(x in fp32, |x| as int32 bits): bits are ordered as the numbers are, NaN above infinity."""
    x = tl.load(p_x + col, mask=col < cols, other=0).to(tl.float32)
    return x, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(v, LARGEST: tl.constexpr):
    """v as int8, or on the grid of e4m3, ties to even: whatever a cast does with the rest is left out of it."""
    if LARGEST == 127:
        # 1.5 · 2²³: the sum's last bits are the integer.
        q = (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # 1.5 · 2²⁰ times the power of two below |v|, which is 2⁻⁶ at least: the sum keeps three bits of v.
        power = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        shift = power.to(tl.float32, bitcast=True) * 1572864.0
        q = ((v + shift) - shift).to(tl.float8e4nv)
    return q


@triton.jit
def ordered(q, ORDER: tl.constexpr):
    """[WIDTH] in the order in which the bytes of words of ORDER-bit codes (pack.py) name the columns of each block of 128.

    4 bits: nibble 4h + 2p₁ + p₀ of word (v, t) is column 64p₁ + 32p₀ + 8v + 2t + h, and comes as byte 2h + p₁ of part p₀;
    8 bits: byte 2h + p of word (v, t) is column 64p + 8v + 2t + h.
    """
    BLOCKS: tl.constexpr = q.shape[0] // 128
    if ORDER == 4:
        q = tl.permute(tl.reshape(q, (BLOCKS, 2, 2, 4, 4, 2)), (0, 3, 2, 4, 5, 1))
    if ORDER == 8:
        q = tl.permute(tl.reshape(q, (BLOCKS, 2, 8, 4, 2)), (0, 2, 3, 4, 1))
    return tl.reshape(q, (BLOCKS * 128,)) if ORDER else q


@triton.jit
def _put(p_q, x, col, width, inverse, broken, LARGEST: tl.constexpr, ORDER: tl.constexpr):
    tl.store(p_q + col, ordered(_rounded(tl.where(broken, 0.0, x) * inverse, LARGEST), ORDER), mask=col < width)


@triton.jit
def _quantize_kernel(
    p_q, p_scale, p_x, cols, width,
    LARGEST: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, CHUNKS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_x += row * cols
    p_q += row * width
    col = tl.arange(0, WIDTH)
    x, largest = _magnitude(p_x, col, cols)
    bits = tl.max(largest, 0)
    if TAIL:
        tail = WIDTH + tl.arange(0, TAIL)
        x_tail, largest = _magnitude(p_x, tail, cols)
        bits = tl.maximum(bits, tl.max(largest, 0))
    for i in range(1, CHUNKS):
        bits = tl.maximum(bits, tl.max(_magnitude(p_x, i * WIDTH + col, cols)[1], 0))
    largest = tl.cast(bits, tl.float32, bitcast=True)
    # Below 1e-30 the inverse would overflow; infinity and NaN are above every finite number's bits.
    tiny, broken = largest < 1e-30, bits >= 0x7F800000
    limit = tl.full((), LARGEST, tl.float32)
    unusable = tiny | broken
    inverse = tl.where(unusable, 0.0, tl.div_rn(limit, tl.where(unusable, 1.0, largest)))
    scale = tl.where(tiny, 0.0, tl.div_rn(largest, limit))
    tl.store(p_scale + row, tl.where(broken, float("nan"), scale))
    for i in range(CHUNKS):
        if CHUNKS > 1:
            x, _ = _magnitude(p_x, i * WIDTH + col, cols)
        _put(p_q, x, i * WIDTH + col, width, inverse, broken, LARGEST, ORDER)
    if TAIL:
        _put(p_q, x_tail, tail, width, inverse, broken, LARGEST, ORDER)


def widths(cols: int) -> tuple[int, int]:
    """Columns that a program holds in one piece, and those of a second piece: powers of two, with little beyond `cols`."""
    whole = min(_WIDTH, max(triton.next_power_of_2(cols), TILE))
    rest = cols - whole // 2
    tail = max(triton.next_power_of_2(rest), TILE) if cols <= _WIDTH and rest > 0 else whole
    return (whole, 0) if 2 * tail >= whole else (whole // 2, tail)


def launch_quantize_rows(x: Tensor, kind: str, order: int = 0) -> tuple[Tensor, Tensor]:
    """`reference_a8.quantize_rows` on its device; x contiguous [M, K].

    order: 0, or the bits (4, 8) of the packed codes that will meet it: columns as a8_packed wants them, whole blocks of 128.
    """
    rows, cols = x.shape
    dtype, largest = LARGEST[kind]
    width = triton.cdiv(cols, TILE) * TILE if order else cols
    q = torch.empty(rows, width, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        held, tail = widths(cols)
        with torch.cuda.device_of(x):
            _quantize_kernel[(rows,)](
                q, scale, x, cols, width, LARGEST=largest, WIDTH=held, TAIL=tail, CHUNKS=1 if tail else triton.cdiv(cols, held), ORDER=order,
                num_warps=max(1, min(4, held // 512)), enable_fp_fusion=False,
            )  # fmt: skip
    return q, scale


@triton.jit
def _pair(low, high, zero, shift, above, B: tl.constexpr, BITS: tl.constexpr, INT: tl.constexpr):
    """[LANES, 2]: codes less zero of both halves of the words at this shift, int8 or f32."""
    code = (low >> shift) & (((1 << B) - 1) * 0x10001)
    if BITS == 3:
        code |= ((high >> above) & 0x10001) << 2
    if INT:
        code += 0x01000100 - zero * 0x10001  # the low byte of each half is the difference: nothing borrows across
        pair = tl.join(code.to(tl.int8), (code >> 16).to(tl.int8))
    else:
        pair = tl.join(((code & 0xFF) - zero).to(tl.float32), ((code >> 16) - zero).to(tl.float32))
    return pair


@triton.jit
def _interleave(even, odd, SIZE: tl.constexpr):
    """[LANES, SIZE] twice to [LANES, 2·SIZE], one after the other within each lane."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (even.shape[0], 2 * SIZE))


@triton.jit
def _unpack_kernel(
    p_out, p_codes, p_zeros, rows, cols, blocks, stride_zn, stride_zg,
    GROUP: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    INT: tl.constexpr = p_out.dtype.element_ty == tl.int8
    # A lane takes words v, B + v, 2B + v, 3B + v of a block: 8 neighbouring columns at each of their 16 // B shifts.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    v, row, block = lane % B, (lane // B // blocks).to(tl.int64), lane // B % blocks
    inside = row < rows
    p_block = p_codes + (lane // B).to(tl.int64) * (4 * BITS)
    low0 = tl.load(p_block + v, mask=inside, other=0)
    low1 = tl.load(p_block + v + B, mask=inside, other=0)
    low2 = tl.load(p_block + v + 2 * B, mask=inside, other=0)
    low3 = tl.load(p_block + v + 3 * B, mask=inside, other=0)
    high0, high1, high2, high3 = low0, low1, low2, low3
    if BITS == 3:
        high0 = tl.load(p_block + 8, mask=inside, other=0)
        high1 = tl.load(p_block + 9, mask=inside, other=0)
        high2 = tl.load(p_block + 10, mask=inside, other=0)
        high3 = tl.load(p_block + 11, mask=inside, other=0)
    for p in tl.static_range(16 // B):
        col = block * 128 + p * (8 * B) + v * 8
        zero = tl.full((LANES,), ZERO, tl.int32)
        if ZERO < 0:
            zero = tl.load(p_zeros + row * stride_zn + col // GROUP * stride_zg, mask=inside & (col < cols), other=0).to(tl.int32)
        above = 2 * p + v
        first = _interleave(
            _pair(low0, high0, zero, p * B, above, B, BITS, INT), _pair(low1, high1, zero, p * B, above, B, BITS, INT), 2
        )
        second = _interleave(
            _pair(low2, high2, zero, p * B, above, B, BITS, INT), _pair(low3, high3, zero, p * B, above, B, BITS, INT), 2
        )
        w = _interleave(first, second, 4).to(p_out.dtype.element_ty)
        at = col[:, None] + tl.arange(0, 8)[None, :]
        tl.store(p_out + row[:, None] * cols + at, w, mask=inside[:, None] & (at < cols))


def launch_unpack(codes: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, out: Tensor) -> None:
    """`reference_a8.unpack` into `out` on its device; arguments as checked by ops_a8.py."""
    rows, plane, blocks = len(codes), 2 if bits == 3 else bits, triton.cdiv(cols, TILE)
    zero = (1 << (bits - 1)) if zeros is None or bits == 8 else -1
    if bits == 8 and out.dtype != torch.int8:
        zero, out = 0, out.view(torch.int8)
    if out.numel():
        with torch.cuda.device_of(out):
            _unpack_kernel[(triton.cdiv(rows * blocks * plane, _LANES),)](
                out, codes, zeros, rows, cols, blocks, *((0, 0) if zero >= 0 else zeros.stride()), GROUP=min(group_size, 1 << 30),
                BITS=bits, B=plane, LANES=_LANES, ZERO=zero, num_warps=_LANES // 32,
            )  # fmt: skip


@triton.jit
def _sums_kernel(p_sums, p_q, groups, cols, group_size, WIDTH: tl.constexpr):
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    DTYPE: tl.constexpr = p_sums.dtype.element_ty
    total = tl.zeros((WIDTH,), DTYPE)
    for start in range(group * group_size, tl.minimum((group + 1) * group_size, cols), WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = (col < cols) & (col < (group + 1) * group_size)
        total += tl.where(inside, tl.load(p_q + row * cols + col, mask=inside).to(DTYPE), 0)
    tl.store(p_sums + row * groups + group, tl.sum(total, 0))


def launch_group_sums(q: Tensor, group_size: int) -> Tensor:
    """`reference_a8.group_sums` of [M, K] on its device."""
    rows, cols = q.shape
    group_size = min(group_size, cols)
    groups = triton.cdiv(cols, group_size)
    sums = torch.empty(rows, groups, dtype=torch.int32 if q.dtype == torch.int8 else torch.float32, device=q.device)
    if rows:
        with torch.cuda.device_of(q):
            _sums_kernel[(rows * groups,)](
                sums, q, groups, cols, group_size, WIDTH=min(1024, triton.next_power_of_2(group_size)), num_warps=1
            )
    return sums
