"""Updates of integer codes on their grid in plain PyTorch: the definition of their bits (QuZO, arXiv 2502.12346).

One fp32 product c·u per element and direction, summed without contraction; all that follows is exact, so that every device
computes the same codes.
"""

import torch
from torch import Tensor

from qzo_kernels.pack import tile_codes, untile_codes
from qzo_kernels.reference_noise import integer_normal, uniform24

CLIP = 4  # sigmas at the last level of a quantized normal


def quantized_normal(
    shape: tuple[int, int], seed: int, step: int, direction: int, uid: int, stream: int, noise_bits: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """int8 [rows, cols]: u with E[u·4/L] = z clipped to ±4, z the direction's integer normal, L = 2^(noise_bits − 1) − 1.

    u = ⌊n/2¹⁴⌋ + (uniform24 < (n mod 2¹⁴)·2¹⁰), n = 4096·z·L, kept in ±L. `stream` selects the roundings of one z:
    1 in a forward, 2 in an update. noise_bits 2 … 8.
    """
    top = (1 << (noise_bits - 1)) - 1
    n = integer_normal(shape, seed, step, direction, uid, device).to(torch.int32) * top
    up = uniform24(shape, seed, step, direction, uid, stream, device) < (n & 0x3FFF) << 10
    return ((n >> 14) + up).clamp_(-top, top).to(torch.int8)


def rounded(x: Tensor, uniform: Tensor, limit: float) -> Tensor:
    """int32: f32 x rounded to one of its two neighbouring integers at random, E = x; |x| counts as `limit` ≤ 2³⁰ at most.

    |x| splits exactly into a whole and a fraction; the fraction's first 24 bits are compared with `uniform` in [0, 2²⁴), and
    a larger fraction rounds away from 0. So E falls short of |x| by less than 2⁻²⁴, whatever x, and −x gives the negative.
    """
    size = x.abs()
    size = torch.where(size < limit, size, limit)
    whole = size.to(torch.int32)
    whole = whole + (uniform < ((size - whole) * 2.0**24).to(torch.int32))
    return torch.where(x < 0, -whole, whole)


def update_codes_(
    codes: Tensor, residual: Tensor | None, state: Tensor, coefs: Tensor, uid: int, bits: int, cols: int, noise_bits: int, stream: int
) -> None:
    """Move codes by −Σ_i coefs[s, i]·u_i for S steps in place, u_i the `quantized_normal` of `stream` (1: as in the forward; 2).

    codes int32 [N, tiled_words(cols, bits)] as pack.tile_codes lays them out; state int64 [2] = (seed, first step);
    coefs f32 [S, D], finite, in code units per noise level: η μ_i/n · 4/L / (grid step). 0 changes no bit.

    Without a residual every direction's step is `rounded` on its own (stream 3), at most 2¹⁵ either way; then the sum is taken off
    and the code kept in 0 … 2^bits − 1.

    residual int16 [N, cols]: error feedback, γ = 1. It holds what a code lacks to its position, in 2⁻¹⁶ of a grid step, so
    −½ … ½ − 2⁻¹⁶. The sum over directions (fp32, in order) is `rounded` to that unit (stream 3 of direction 0), at most 2¹⁴ grid
    steps, and taken off the position; the code is the position rounded, halves up. Positions are kept in
    −½ … 2^bits − ½ − 2⁻¹⁶: at an edge the residual is the half that points outwards, and what lies farther is dropped.
    """
    seed, first = state.tolist()
    shape, top = (codes.shape[0], cols), (1 << bits) - 1
    q = untile_codes(codes, bits, cols).to(torch.int32)
    at = None if residual is None else (q << 16) + residual
    for s in range(len(coefs)):
        moves = _moves(coefs[s], shape, seed, first + s, uid, noise_bits, stream)
        if at is None:
            for i, move in moves:
                q -= rounded(move, uniform24(shape, seed, first + s, i, uid, 3, codes.device), 2.0**15)
            q.clamp_(0, top)
        else:
            g = torch.zeros(shape, device=codes.device)
            for _, move in moves:
                g += move
            at -= rounded(g * 2.0**16, uniform24(shape, seed, first + s, 0, uid, 3, codes.device), 2.0**30)
            at.clamp_(-(1 << 15), (top << 16) + (1 << 15) - 1)
    if at is not None:
        q = (at + (1 << 15)) >> 16
        residual.copy_(at - (q << 16))
    codes.copy_(tile_codes(q.to(torch.uint8), bits))


def _moves(coefs: Tensor, shape: tuple[int, int], seed: int, step: int, uid: int, noise_bits: int, stream: int):
    """(direction, f32 c·u) of every direction that moves something, in order."""
    for i, c in enumerate(coefs):
        if c.item():
            yield i, quantized_normal(shape, seed, step, i, uid, stream, noise_bits, coefs.device).to(torch.float32) * c
