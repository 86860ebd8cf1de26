"""Triton kernels of `quantize_rows_asym` and `fake_quantize_rows`: rows of x to codes of up to 8 bits about a zero point of their own,
or to the numbers that these stand for.

Compiled without floating-point contraction; they equal the reference's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels.a8_rows import ordered, widths
from qzo_kernels.pack import TILE
from qzo_kernels.reference_qat import FLOOR
from qzo_kernels.rounding import rint

_INFINITY = tl.constexpr(0x7F800000)
_FLOOR = tl.constexpr(FLOOR)
_TILE = 1024  # elements per program at least, for narrow rows


@triton.jit
def _key(bits):
    """int32 bits of f32 in the order of the numbers, NaN at either end; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _extremes(p_x, col, cols):
    """(x in fp32, the least and the largest key)."""
    x = tl.load(p_x + col, mask=col < cols, other=0).to(tl.float32)
    key = _key(x.to(tl.int32, bitcast=True))
    return x, tl.min(tl.where(col < cols, key, 0x7FFFFFFF), 0), tl.max(tl.where(col < cols, key, -0x80000000), 0)


@triton.jit
def _finite(v):
    return (v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INFINITY


@triton.jit
def _put(p_q, x, col, cols, width, step, zero, broken, BITS: tl.constexpr, ORDER: tl.constexpr):
    code = rint(tl.div_rn(x, tl.zeros_like(x) + step)) + zero
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0) - (1 << (BITS - 1)) * 1.0
    q = tl.where(broken | (col >= cols), 0.0, code).to(tl.int8)
    tl.store(p_q + col, ordered(q, ORDER), mask=col < width)


@triton.jit
def _asym_kernel(
    p_q, p_scale, p_shift, p_x, p_span, cols, width, BITS: tl.constexpr, SPAN: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, CHUNKS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_x += row * cols
    p_q += row * width
    col = tl.arange(0, WIDTH)
    x, least, most = _extremes(p_x, col, cols)
    if TAIL:
        tail = WIDTH + tl.arange(0, TAIL)
        x_tail, low, high = _extremes(p_x, tail, cols)
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    for i in range(1, CHUNKS):
        _, low, high = _extremes(p_x, i * WIDTH + col, cols)
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    low, high = tl.cast(_key(least), tl.float32, bitcast=True), tl.cast(_key(most), tl.float32, bitcast=True)
    broken = (_finite(low) & _finite(high)) == 0
    low, high = tl.where(broken, 0.0, low), tl.where(broken, 0.0, high)
    if SPAN:
        span = tl.load(p_span)
        low, high = tl.where(low < 0, low * span, low), tl.where(high > 0, high * span, high)
    step = tl.div_rn(high - low, tl.full((), (1 << BITS) - 1, tl.float32))
    step = tl.where(step < _FLOOR, _FLOOR, step)
    zero = rint(tl.div_rn(-low, step))
    broken = broken | ((_finite(step) & _finite(zero)) == 0)
    step, zero = tl.where(broken, 1.0, step), tl.where(broken, 0.0, zero)
    tl.store(p_scale + row, tl.where(broken, float("nan"), step))
    tl.store(p_shift + row, tl.where(broken, float("nan"), step * ((1 << (BITS - 1)) - zero)))
    for i in range(CHUNKS):
        if CHUNKS > 1:
            x, _, _ = _extremes(p_x, i * WIDTH + col, cols)
        _put(p_q, x, i * WIDTH + col, cols, width, step, zero, broken, BITS, ORDER)
    if TAIL:
        _put(p_q, x_tail, tail, cols, width, step, zero, broken, BITS, ORDER)


def launch_quantize_rows_asym(x: Tensor, bits: int, span: Tensor | None, order: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_a8.quantize_rows_asym` on its device; x contiguous [M, K], `order` as in `a8_rows.launch_quantize_rows`."""
    rows, cols = x.shape
    width = triton.cdiv(cols, TILE) * TILE if order else cols
    q = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale, shift = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        held, tail = widths(cols)
        with torch.cuda.device_of(x):
            _asym_kernel[(rows,)](
                q, scale, shift, x, span, cols, width, BITS=bits, SPAN=span is not None,
                WIDTH=held, TAIL=tail, CHUNKS=1 if tail else triton.cdiv(cols, held), ORDER=order,
                num_warps=max(1, min(4, held // 512)), enable_fp_fusion=False,
            )  # fmt: skip
    return q, scale, shift


@triton.jit
def _bounds(p_x, inside):
    """(x in fp32, the least and the largest key of each row) of a tile."""
    x = tl.load(p_x, mask=inside, other=0).to(tl.float32)
    key = _key(x.to(tl.int32, bitcast=True))
    return x, tl.min(tl.where(inside, key, 0x7FFFFFFF), 1), tl.max(tl.where(inside, key, -0x80000000), 1)


@triton.jit
def _put_fake(p_out, x, inside, step, zero, TOP: tl.constexpr):
    # Not tl.minimum and tl.maximum, which would turn a NaN into a code.
    code = rint(tl.div_rn(x, tl.zeros_like(x) + step)) + zero
    code = tl.where(code < 0.0, 0.0, code)
    code = tl.where(code > TOP, TOP * 1.0, code)
    tl.store(p_out, ((code - zero) * step).to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _fake_kernel(
    p_out, p_x, p_span, rows, cols, TOP: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    p_x += (row * cols)[:, None]
    p_out += (row * cols)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    x, least, most = _bounds(p_x + col, there & (col < cols))
    if TAIL:
        tail = WIDTH + tl.arange(0, TAIL)[None, :]
        x_tail, low, high = _bounds(p_x + tail, there & (tail < cols))
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    for i in range(1, CHUNKS):
        _, low, high = _bounds(p_x + i * WIDTH + col, there & (i * WIDTH + col < cols))
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    low, high = _key(least).to(tl.float32, bitcast=True), _key(most).to(tl.float32, bitcast=True)
    if SPAN:
        span = tl.load(p_span)
        low, high = tl.where(low < 0, low * span, low), tl.where(high > 0, high * span, high)
    step = tl.div_rn(high - low, tl.full((ROWS,), TOP, tl.float32))
    step = tl.where(step < _FLOOR, _FLOOR, step)
    zero = rint(tl.div_rn(-low, step))[:, None]
    step = step[:, None]
    for i in range(CHUNKS):
        at = i * WIDTH + col
        if CHUNKS > 1:
            x = tl.load(p_x + at, mask=there & (at < cols), other=0).to(tl.float32)
        _put_fake(p_out + at, x, there & (at < cols), step, zero, TOP)
    if TAIL:
        _put_fake(p_out + tail, x_tail, there & (tail < cols), step, zero, TOP)


def _geometry(cols: int) -> tuple[int, dict[str, int]]:
    """(rows of a program, constants of the launch): narrow rows share a program, a wide one is held in one or two pieces."""
    held, tail = widths(cols) if cols > TILE else (max(16, triton.next_power_of_2(cols)), 0)
    height, chunks = max(1, _TILE // held), 1 if tail else triton.cdiv(cols, held)
    return height, {"ROWS": height, "WIDTH": held, "TAIL": tail, "CHUNKS": chunks, "num_warps": min(8, height * held // 512)}


def launch_fake_quantize_rows(x: Tensor, bits: int, span: Tensor | None) -> Tensor:
    """`reference_qat.fake_quantize_rows` on its device; x contiguous [M, C]."""
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    if rows:
        height, constants = _geometry(cols)
        with torch.cuda.device_of(x):
            _fake_kernel[(triton.cdiv(rows, height),)](
                out, x, span, rows, cols, TOP=(1 << bits) - 1, SPAN=span is not None, **constants, enable_fp_fusion=False
            )
    return out
