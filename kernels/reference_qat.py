"""Fake quantization in plain PyTorch, the arithmetic of ZeroQAT (arXiv 2509.00031): the definition of correct for kernels to come.

Weights, asymmetric and uniform, by row and group of columns; c_low, c_high fp32 [N, G] are the logits of LWC's two bounds:

    low  = sigmoid(c_low) · min(0, min_g W)      high = sigmoid(c_high) · max(0, max_g W)
    Δ    = max((high - low) / (2^b - 1), FLOOR)  z    = round(-low / Δ), a code: 0 … 2^b - 1
    Q(W) = Δ · (clamp(round(W / Δ) + z, 0, 2^b - 1) - z)

A logit of 3 keeps 95 % of a side, +infinity all of it: rounding to nearest without clipping. The range holds 0, so that z is a code and a
packed checkpoint can store it. (Δ, z) are computed apart from Q: once per update, and frozen across the ± pair of a step.

Activations, by row (a token; a token and head for q, k, v of attention), with nothing learned or kept:

    Δ = max((high - low) / (2^b - 1), FLOOR),   z = round(-low / Δ),   x̂ = Δ · (clamp(round(x / Δ) + z, 0, 2^b - 1) - z)
    low = min x, times r where it is negative,  high = max x, times r where it is positive

The range is the row's own, without 0 if 0 is not in it; r, the span, is 1 in the paper. 16 bits are no quantization. All in fp32, ties to
even; the sigmoid in fp64, rounded once, so that every device computes one grid.

A latent W under noise and its update (u noise version 1, unit[n, k] = rows[n, g]·cols[k], a factor that is None counts 1):

    forward     Q(((W + eps·(unit·u))·s_in / s_out); Δ, z)                     eps signed
    `latent`    W ← W - Σ_i c_i·(unit·u_i)
    `realized`  W ← W - c·(unit·((q+ - q-) / (2·eps)))                         q±: the codes of the forward under ±eps, of W before the step

One rounding per operation, in the order of the brackets, and from left to right; sums over directions begin at +0. No contraction, IEEE
division: with Rademacher u every device computes the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels.reference_noise import gaussian, rademacher

FLOOR = 2.0**-24  # of a step: the smallest number of fp16, in which a checkpoint holds it


class LatentNoise(NamedTuple):
    """Noise on one latent weight [N, K], for V variants of it: states int64 [V, 3], rows (seed, step, direction); eps fp32 [V], signed.

    rows fp32 [N, G] and cols fp32 [K] make the unit.
    """

    states: Tensor
    eps: Tensor
    uid: int
    rows: Tensor | None
    cols: Tensor | None
    gaussian: bool


class Realized(NamedTuple):
    """The grid on which a forward with ±eps saw a weight: step, zero fp32 [N, G]; s_in fp32 [K], s_out fp32 [N]."""

    step: Tensor
    zero: Tensor
    bits: int
    s_in: Tensor | None
    s_out: Tensor | None
    eps: float


def clipped_grid(weight: Tensor, bits: int, group_size: int, low: Tensor | None = None, high: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Δ, z) fp32 [N, G] of weight fp32 [N, K]; low and high are logits fp32 [N, G], None for no clipping.

    group_size -1 is a whole row; the last group may be shorter.
    """
    groups = grouped(weight, group_size)
    least, most = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    return bounded_grid(least if low is None else least * _kept(low), most if high is None else most * _kept(high), bits)


def _kept(logits: Tensor) -> Tensor:
    return logits.double().sigmoid().float()


def bounded_grid(least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(Δ, z) of the ranges least ≤ 0 ≤ most, of any one shape."""
    top = (1 << bits) - 1
    # On CUDA a number divides by its reciprocal, a tensor by itself.
    step = ((most - least) / least.new_full((), top)).clamp_(min=FLOOR)
    return step, (-least / step).round_().clamp_(0, top)


def fake_quantize(weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """Q(W) fp32 [N, K] of weight fp32 [N, K] on the grid step, zero fp32 [N, G]. `weight` is left as it is."""
    return rounded(grouped(weight, group_size), step[..., None], zero[..., None], bits).flatten(-2)[..., : weight.shape[-1]]


def grid_codes(weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes of Q(W), fp32 [N, K] of whole numbers 0 … 2^b - 1; as in `fake_quantize`."""
    return _codes(grouped(weight, group_size), step[..., None], zero[..., None], bits).flatten(-2)[..., : weight.shape[-1]]


def rounded(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Δ · (clamp(round(x / Δ) + z, 0, 2^b - 1) - z); the three tensors broadcast."""
    return _codes(x, step, zero, bits).sub_(zero).mul_(step)


def fake_quantize_rows(x: Tensor, bits: int, span: Tensor | None = None) -> Tensor:
    """x̂ of x [..., C], each row by its own range, in the dtype of x. 16 bits give x itself. span fp32 [1]: r; None is 1."""
    if bits == 16:
        return x
    wide = x.float()
    return rounded(wide, *row_grid(wide, bits, span), bits).to(x.dtype)


def row_grid(x: Tensor, bits: int, span: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Δ, z) fp32 [..., 1] of the rows of x fp32 [..., C], as `fake_quantize_rows` takes them."""
    least, most = x.aminmax(dim=-1, keepdim=True)
    if span is not None:
        least, most = torch.where(least < 0, least * span, least), torch.where(most > 0, most * span, most)
    step = ((most - least) / x.new_full((), (1 << bits) - 1)).clamp_(min=FLOOR)
    return step, (-least / step).round_()


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[..., K] to [..., G, g]; a shorter last group repeats its last column, which changes neither its range nor what is cut off again."""
    cols = weight.shape[-1]
    size = cols if group_size == -1 else group_size
    if cols % size:
        weight = torch.cat((weight, weight[..., -1:].expand(*weight.shape[:-1], -cols % size)), -1)
    return weight.unflatten(-1, (-1, size))


def effective_weight(
    weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype, s_in: Tensor | None = None,
    s_out: Tensor | None = None, noise: LatentNoise | None = None,
) -> Tensor:  # fmt: skip
    """[V, N, K] of dtype: what V forwards see of a latent weight [N, K] (fp32, or bf16 or fp16 without noise); V = 1 without noise.

    step, zero fp32 [N, G], the grid; s_in fp32 [K], s_out fp32 [N]. Rounded once to dtype.
    """
    if noise is None:
        seen = [weight.float()]
    else:
        states, eps, uid, rows, cols, is_gaussian = noise
        unit = _unit(weight.shape, group_size, rows, cols)
        seen, last = [], None
        for state, e in zip(states.tolist(), eps, strict=True):
            if state != last:
                last, u = state, _noise(weight, *state, uid, is_gaussian)
                moved = u if unit is None else unit * u
            seen.append(weight + moved * e)
    return torch.stack([fake_quantize(smoothed(w, s_in, s_out), step, zero, bits, group_size).to(dtype) for w in seen])


def update_latent_(
    weight: Tensor, state: Tensor, coefs: Tensor, uid: int, group_size: int, rows: Tensor | None, cols: Tensor | None, is_gaussian: bool,
    realized: Realized | None = None,
) -> None:  # fmt: skip
    """Apply S steps, one after another, to a latent weight fp32 [N, K] in place.

    state int64 [2] = (seed, first step); coefs fp32 [S, D], D = 1 where the step is `realized`. Coefficients of 0 change no bit.
    """
    (seed, first), unit = state.tolist(), _unit(weight.shape, group_size, rows, cols)
    for s, row in enumerate(coefs):
        if not row.any():
            continue
        total = torch.zeros_like(weight)
        for direction, c in enumerate(row):
            u = _noise(weight, seed, first + s, direction, uid, is_gaussian)
            if realized is not None:
                u = _realized(weight, u if unit is None else unit * u, group_size, realized)
            total += (u if unit is None else unit * u) * c
        weight -= total


def _realized(weight: Tensor, moved: Tensor, group_size: int, on: Realized) -> Tensor:
    """(q+ - q-) / (2·eps), in grid steps per eps."""
    eps = torch.tensor(on.eps, dtype=torch.float32, device=weight.device)
    plus, minus = (
        grid_codes(smoothed(weight + moved * e, on.s_in, on.s_out), on.step, on.zero, on.bits, group_size) for e in (eps, -eps)
    )
    return (plus - minus) / (2 * eps)


def _codes(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (x / step).round_().add_(zero).clamp_(0, (1 << bits) - 1)


def smoothed(weight: Tensor, s_in: Tensor | None, s_out: Tensor | None) -> Tensor:
    """S = s_in ⊙ W ⊘ s_out of weight fp32 [N, K], s_in fp32 [K], s_out fp32 [N]; None for ones."""
    weight = weight if s_in is None else weight * s_in
    return weight if s_out is None else weight / s_out[:, None]


def _unit(shape: torch.Size, group_size: int, rows: Tensor | None, cols: Tensor | None) -> Tensor | None:
    """fp32, of a shape that broadcasts to [N, K]."""
    if rows is None:
        return cols
    wide = rows.repeat_interleave(shape[1] if group_size == -1 else group_size, 1)[:, : shape[1]]
    return wide if cols is None else wide * cols


def _noise(like: Tensor, seed: int, step: int, direction: int, uid: int, is_gaussian: bool) -> Tensor:
    return (gaussian if is_gaussian else rademacher)(like.shape, seed, step, direction, uid, like.device)
