"""Triton kernel of `a8_matmul` from packed codes of 4 or 8 bits: the weights go from their words into the tensor core's registers.

A mask makes four signed bytes out of a word, 16·(q − 8) of every other nibble, or q − 128: no weight in memory, no shared memory for it.
The columns of x come in the order of those bytes (a8_rows, `order`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qzo_kernels.a8_matmul import place
from qzo_kernels.pack import TILE


@triton.jit
def _bytes(w):
    """int8 [..., 2, 2]: the bytes of int32 [...], lowest first."""
    return tl.join(tl.join(w.to(tl.int8), (w >> 16).to(tl.int8)), tl.join((w >> 8).to(tl.int8), (w >> 24).to(tl.int8)))


@triton.jit
def _weights(d_w, row, block, BITS: tl.constexpr, ROWS: tl.constexpr):
    """int8 [ROWS, 128]: 16·(q − 8) or q − 128 of a block."""
    w = tl.reshape(d_w.load([row, block * (4 * BITS)]), (ROWS, 4, BITS))
    w = tl.reshape(tl.permute(w, (0, 2, 1)), (ROWS, 4 * BITS))
    if BITS == 4:
        w = w ^ -2004318072  # 0x88888888: q − 8 in two's complement
        q = tl.join(_bytes((w << 4) & -252645136), _bytes(w & -252645136))  # the even nibbles, the odd ones
        q = tl.permute(tl.reshape(q, (ROWS, 4, 4, 4, 2)), (0, 1, 4, 2, 3))
    else:
        q = _bytes(w ^ -2139062144)  # 0x80808080
    return tl.reshape(q, (ROWS, 128))


@triton.jit
def _zero_part(p_zeros, p_sums, held, m, end, group, groups, stride_zn, stride_zg, BITS: tl.constexpr):
    """int32 [n, m]: what the middle of the range, subtracted in place of the zero point, leaves out of a group's product."""
    zero = tl.load(p_zeros + held * stride_zn + group * stride_zg).to(tl.int32)
    total = tl.load(p_sums + m.to(tl.int64) * groups + group, mask=m < end, other=0)
    away = (8 - zero) * 16 if BITS == 4 else 128 - zero
    return away[:, None] * total[None, :]


@triton.jit
def _packed_kernel(
    d_x, d_w, p_y, p_x_scale, p_scales, p_bias, p_zeros, p_sums, rows, variants, N, K, groups, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    ASYM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(rows, COLUMNS)
    down, along = place(tl.program_id(0), tl.cdiv(N, ROWS), wide * variants, ORDER)
    variant = along // wide
    row = variant * rows + along % wide * COLUMNS
    end = (variant + 1) * rows
    n = down * ROWS + tl.arange(0, ROWS)
    m = row + tl.arange(0, COLUMNS)
    held = tl.minimum(n, N - 1)
    p_scale = p_scales + (variant.to(tl.int64) * N + held) * groups
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        group = block * 128 // GROUP if GROUP else 0
        product = tl.dot(_weights(d_w, down * ROWS, block, BITS, ROWS), d_x.load([row, block * 128]).T, out_dtype=tl.int32)
        if ASYM:
            if block * 128 % (GROUP if GROUP else 1 << 30) == 0:
                product += _zero_part(p_zeros, p_sums, held, m, end, group, groups, stride_zn, stride_zg, BITS)
        acc += product.to(tl.float32) * tl.load(p_scale + group)[:, None]
    y = acc * (tl.load(p_x_scale + m, mask=m < end, other=0) * (0.0625 if BITS == 4 else 1.0))[None, :]
    if BIAS:
        y += tl.load(p_bias + held).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < end)[None, :]
    tl.store(p_y + m.to(tl.int64)[None, :] * N + n[:, None], y.to(p_y.dtype.element_ty), mask=mask)


def launch_a8_packed(
    xq: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int, cols: int, dtype: torch.dtype,
    bias: Tensor | None = None, zeros: Tensor | None = None, sums: Tensor | None = None,
    columns: int = 128, warps: int = 4, stages: int = 3, order: int = 8,
) -> Tensor:  # fmt: skip
    """`reference_a8.a8_matmul` of xq int8 [M, whole blocks] from launch_quantize_rows(…, order=bits) with packed codes.

    scales f32 [V, N, G] as forwards see them, group_size a multiple of 128 or at least K; zeros uint8 [N, G] with
    sums int32 [M, G] of xq over the groups, or None: 2**(bits − 1).
    """
    variants, n, groups = scales.shape
    rows, tall = len(xq) // variants, 64 * warps // 4
    y = torch.empty(len(xq), n, dtype=dtype, device=xq.device)
    grid = (-(-n // tall) * -(-rows // columns) * variants,)
    with torch.cuda.device_of(xq):
        _packed_kernel[grid](
            TensorDescriptor.from_tensor(xq, [columns, TILE]), TensorDescriptor.from_tensor(codes, [tall, 4 * bits]),
            y, x_scale, scales, bias, zeros, sums,
            rows, variants, n, cols, groups, *((0, 0) if zeros is None else zeros.stride()),
            BITS=bits, GROUP=0 if group_size >= cols else group_size, ROWS=tall, COLUMNS=columns, STAGES=stages, ORDER=order,
            ASYM=zeros is not None, BIAS=bias is not None, num_warps=warps,
        )  # fmt: skip
    return y
