"""Weights whose codes are under quantized noise, in plain PyTorch: the definition of correct for QuZO's forwards (arXiv 2502.12346).

The noise is in grid steps: an effective weight is scale·(q − zero + eps·u), u integers, and never stored with the codes.
"""

import torch
from torch import Tensor

from qzo_kernels import reference_a8
from qzo_kernels.pack import untile_codes
from qzo_kernels.reference_codes import quantized_normal


def noisy_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int,
    state: Tensor, eps: Tensor, uid: int, noise_bits: int,
) -> Tensor:  # fmt: skip
    """f32 [V, N, K]: scale·((q − zero) + eps·u) in fp32 in this order, u the `quantized_normal` of stream 1 of variant v's state.

    state int64 [V, 3], rows (seed, step, direction); eps f32 [V], signed, of one level of u in grid steps: ε·4/L.
    The rest as in `reference.dequantize`.
    """
    shape, groups = (codes.shape[0], cols), torch.arange(cols, device=codes.device) // group_size
    middle = 1 << (bits - 1) if zeros is None else zeros[:, groups].float()
    distance, scale = untile_codes(codes, bits, cols).float() - middle, scales[:, groups]
    seen = []
    for (seed, step, direction), size in zip(state.tolist(), eps, strict=True):
        u = quantized_normal(shape, seed, step, direction, uid, 1, noise_bits, codes.device)
        seen.append((distance + u.float() * size) * scale)
    return torch.stack(seen)


def noisy_matmul_a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, kind: str, bias: Tensor | None,
    state: Tensor, eps: Tensor, uid: int, noise_bits: int,
) -> Tensor:  # fmt: skip
    """y [M, N] of x's dtype with x [M, K] rounded to 8 bits per row and the weights of `noisy_weight`; V blocks of rows see one variant each.

    x_scale[m]·Σ_g s[n, g]·(Σ_{k in g} xq·(q − zero) + eps[v]·Σ_{k in g} xq·u) + bias[n]: both sums in integers, or e4m3 products; the
    rest in fp64, rounded once. kind "int8" or "fp8": as in `ops_a8.quant_matmul_a8`; "fp8" with noise_bits ≤ 5, whose levels e4m3 holds.
    """
    xq, x_scale = reference_a8.quantize_rows(x, kind)
    dtype, shape = reference_a8.LARGEST[kind][0], (codes.shape[0], x.shape[1])
    weight = torch.empty(shape, dtype=dtype, device=x.device)
    reference_a8.unpack(codes, zeros, bits, group_size, weight)
    quiet = reference_a8.a8_matmul(xq, x_scale, weight, scales[None], group_size, torch.float64, bias, zeros if bits == 8 else None)
    parts = []
    for y, part, size, (seed, step, direction), at in zip(
        quiet.chunk(len(eps)), xq.chunk(len(eps)), x_scale.chunk(len(eps)), state.tolist(), eps, strict=True
    ):
        u = quantized_normal(shape, seed, step, direction, uid, 1, noise_bits, x.device).to(dtype)
        parts.append(y + at.double() * reference_a8.a8_matmul(part, size, u, scales[None], group_size, torch.float64))
    return torch.cat(parts).to(x.dtype)
