"""Triton kernels between the matmuls of a decoder: RMS norm with the residual's sum, SwiGLU's product, rotary embedding.

Each reads its operands once and rounds where transformers rounds. Launch settings depend on widths alone, never on the number of
rows: a row's bits are the same in every batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements per program at least, for narrow rows


@triton.jit
def _rms_norm_kernel(
    p_out, p_sum, p_x, p_residual, p_weight, rows, eps,
    WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    offsets = row[:, None] * WIDTH + col[None, :]
    mask = (row < rows)[:, None] & (col < WIDTH)[None, :]
    x = tl.load(p_x + offsets, mask=mask, other=0.0)
    if RESIDUAL:
        residual = tl.load(p_residual + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(p_sum + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) * (1.0 / WIDTH) + eps)
    scaled = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    weight = tl.load(p_weight + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    tl.store(p_out + offsets, (weight[None, :] * scaled).to(x.dtype), mask=mask)


@triton.jit
def _silu_mul_kernel(p_out, p_gate, p_up, cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    across = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    col = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    gate = tl.load(p_gate + row * gate_stride + col, mask=mask)
    up = tl.load(p_up + row * up_stride + col, mask=mask)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(p_out + row * cols + col, (silu * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit
def _rotate(p_out, p_x, batch, place, seq, batch_stride, row_stride, cos_low, cos_high, sin_low, sin_high,
            HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr):  # fmt: skip
    head = tl.arange(0, HEAD_BLOCK)
    col = tl.arange(0, HALF_BLOCK)
    offsets = head[:, None] * (2 * HALF) + col[None, :]
    mask = (head < HEADS)[:, None] & (col < HALF)[None, :]
    p_x += batch * batch_stride + place * row_stride
    p_out += (batch * seq + place) * (2 * HALF * HEADS)
    x_low = tl.load(p_x + offsets, mask=mask)
    x_high = tl.load(p_x + offsets + HALF, mask=mask)
    low = x_low.to(tl.float32)
    high = x_high.to(tl.float32)
    kind: tl.constexpr = x_low.dtype
    y_low = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    y_high = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    tl.store(p_out + offsets, y_low.to(kind), mask=mask)
    tl.store(p_out + offsets + HALF, y_high.to(kind), mask=mask)


@triton.jit
def _rotary_kernel(
    p_q_out, p_k_out, p_q, p_k, p_cos, p_sin, seq, q_batch, q_row, k_batch, k_row,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // seq).to(tl.int64)
    place = (tl.program_id(0) % seq).to(tl.int64)
    col = tl.arange(0, HALF_BLOCK)
    angles = place * (2 * HALF) + col
    mask = col < HALF
    cos_low = tl.load(p_cos + angles, mask=mask).to(tl.float32)[None, :]
    cos_high = tl.load(p_cos + angles + HALF, mask=mask).to(tl.float32)[None, :]
    sin_low = tl.load(p_sin + angles, mask=mask).to(tl.float32)[None, :]
    sin_high = tl.load(p_sin + angles + HALF, mask=mask).to(tl.float32)[None, :]
    _rotate(p_q_out, p_q, batch, place, seq, q_batch, q_row, cos_low, cos_high, sin_low, sin_high, Q_HEADS, HALF, Q_BLOCK, HALF_BLOCK)
    _rotate(p_k_out, p_k, batch, place, seq, k_batch, k_row, cos_low, cos_high, sin_low, sin_high, K_HEADS, HALF, K_BLOCK, HALF_BLOCK)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference_elementwise.rms_norm` on the values' device; arguments as checked by ops_elementwise.py."""
    width = x.shape[-1]
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    height = max(1, _TILE // block)
    rows = x.numel() // width
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(rows, height),)](
            out, total, x, x if residual is None else residual, weight, rows, eps, WIDTH=width,
            RESIDUAL=residual is not None, ROWS=height, BLOCK=block, num_warps=min(16, max(1, height * block // 512)),
        )  # fmt: skip
    return out, total


def launch_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`reference_elementwise.silu_mul` on the values' device; arguments as checked by ops_elementwise.py."""
    cols = gate.shape[-1]
    gates, ups = gate.reshape(-1, cols), up.reshape(-1, cols)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(1024, triton.next_power_of_2(cols))
    with torch.cuda.device_of(gate):
        _silu_mul_kernel[(len(gates) * triton.cdiv(cols, block),)](
            out, gates, ups, cols, gates.stride(0), ups.stride(0), BLOCK=block
        )
    return out


def launch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`reference_elementwise.rotary` on the values' device; arguments as checked by ops_elementwise.py."""
    (batch, seq, width), dim = q.shape, cos.shape[-1]
    q_heads, k_heads, half = width // dim, k.shape[-1] // dim, dim // 2
    q_out, k_out = (torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device) for heads in (q_heads, k_heads))
    power = triton.next_power_of_2
    with torch.cuda.device_of(q):
        # Without contraction: products are rounded before they are added, as transformers does.
        _rotary_kernel[(batch * seq,)](
            q_out, k_out, q, k, cos, sin, seq, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, Q_BLOCK=power(q_heads), K_BLOCK=power(k_heads),
            HALF_BLOCK=power(half), enable_fp_fusion=False,
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
