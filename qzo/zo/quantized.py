"""Statistics of QuZO's quantized noise (arXiv 2502.12346): exact expectations over the frozen table of the integer normal.

A direction z is rounded at random to v = 4u/L, u in -L ... L, L = 2^(noise_bits-1) - 1 (kernels/reference_codes.py): E[v | z] is z
clipped to +-4. The estimate of one direction and its step are

    mu = [l(w + eps v1) - l(w - eps v1)] / 2 eps,     w <- w - lr mu v2

with v2 = v1 (`rge1`, Q-RGE1) or another rounding of the same z (`rge2`, Q-RGE2, the paper's method). On the host, in double.
"""

import functools
import math

import torch
from qzo_kernels import ops_noisy
from qzo_kernels.reference_codes import CLIP
from qzo_kernels.reference_noise import normal_table
from torch import Tensor

from qzo.zo.targets import TensorInfo

_SAMPLE = 1 << 20  # elements
STREAMS = {"rge1": 1, "rge2": 2}  # the rounding that an estimator's update uses; forwards use 1


def level(noise_bits: int) -> float:
    """4/L: standard deviations per level."""
    return CLIP / _top(noise_bits)


@functools.cache
def gain(noise_bits: int) -> float:
    """E[v^2], which Q-RGE1's mean estimate has over the gradient: 1.00, 1.05, 1.30, 3.19 at 8, 4, 3, 2 bits."""
    values, chances = _levels(noise_bits)
    return float((chances * values**2).sum())


@functools.cache
def agreement(noise_bits: int) -> float:
    """E[v1 v2] of two roundings, Q-RGE2's mean estimate over the gradient: 0.99988 at any noise_bits, as only the clip costs."""
    # Given z the two are independent, with one mean.
    return float(((level(noise_bits) * _means(noise_bits)) ** 2).mean())


def signal_to_noise(noise_bits: int, estimator: str) -> float:
    """Signal-to-noise of an estimate in many dimensions, over that with full-precision normal noise (1).

    To first order mu = g.v1, so the estimate mu v2 of a gradient g in N dimensions, its elements independent, has

        signal  |E[mu v2]|^2 = |g|^2 E[v1 v2]^2
        noise   E|mu v2|^2   = |g|^2 ((N - 1) E[v1^2] E[v2^2] + E[v1^2 v2^2])  ->  |g|^2 N E[v1^2] E[v2^2]

    Normal noise has 1/N. Times N: E[v1 v2]^2 / (E[v1^2] E[v2^2]), the squared correlation of both roundings: 1 for Q-RGE1, whose
    gain is in both; (agreement / gain)^2 for Q-RGE2: 1.00, 0.90, 0.60, 0.098 at 8, 4, 3, 2 bits.
    """
    return 1.0 if _known(estimator) == "rge1" else (agreement(noise_bits) / gain(noise_bits)) ** 2


def unit(noise_bits: int, estimator: str) -> float:
    """What a learning rate is multiplied by, so that lr mu is in noise levels u: 4/L, for Q-RGE1 with its gain divided out."""
    return level(noise_bits) / (gain(noise_bits) if _known(estimator) == "rge1" else 1.0)


@functools.cache
def mean_move(noise_bits: int) -> float:
    """E|v|: 0.798 at any noise_bits, since rounding leaves the sign, and so the mean size, as it is."""
    values, chances = _levels(noise_bits)
    return float((chances * values.abs()).sum())


def walk(rate: float, steps: int, noise_bits: int) -> float:
    """Standard deviation, in grid steps, of codes around their intended path after `steps` plain stochastic roundings of rate v.

    A rounding of x has the variance f(1 - f), f the fraction of |x|, and roundings are independent: steps E[f(1 - f)] over v.
    While 4 |rate| <= 1 this is steps (|rate| E|v| - rate^2 E[v^2]): the variance of all that a code moves, less that of its path.
    """
    values, chances = _levels(noise_bits)
    part = (rate * values).abs() % 1
    return math.sqrt(steps * float((chances * part * (1 - part)).sum()))


def sampled(info: TensorInfo, state: Tensor, noise_bits: int) -> dict[str, float]:
    """What the first million elements of a tensor draw at state int64 [2] = (seed, step), in direction 0: mean and mean square of v1
    (expected: 0 and `gain`), mean of v1 v2 (`agreement`), share of v1 at the last level either way."""
    rows, cols = min(info.shape[0], -(-_SAMPLE // info.shape[1])), info.shape[1]
    at = torch.cat((state, state.new_zeros(1)))
    v1, v2 = (ops_noisy.code_noise(rows, cols, at, info.uid, noise_bits, stream).float() * level(noise_bits) for stream in STREAMS.values())
    means = torch.stack((v1.mean(), v1.square().mean(), (v1 * v2).mean(), (v1.abs() >= CLIP).float().mean()))
    return dict(zip(("mean", "mean_square", "agreement", "at_the_clip"), means.tolist(), strict=True))


def _top(noise_bits: int) -> int:
    if noise_bits not in range(2, 9):
        raise ValueError(f"noise_bits = {noise_bits}: expected 2 to 8")
    return (1 << (noise_bits - 1)) - 1


def _known(estimator: str) -> str:
    if estimator not in STREAMS:
        raise ValueError(f"estimator: {estimator!r}; expected rge1, one rounding in forwards and update, or rge2, two")
    return estimator


def _means(noise_bits: int) -> Tensor:
    """f64 [65536]: E[u | z] of every entry of the table; a multiple of 2^-14, so that the 24-bit uniforms meet it exactly."""
    top = _top(noise_bits)
    return (normal_table().double() * (top / 2**14)).clamp_(-top, top)


@functools.cache
def _levels(noise_bits: int) -> tuple[Tensor, Tensor]:
    """The values of v and their probabilities, f64 [2L + 1]."""
    top, mean = _top(noise_bits), _means(noise_bits)
    low = mean.floor()
    part = mean - low
    chances = torch.zeros(2 * top + 2, dtype=torch.float64)  # one more: the neighbour, of no probability, above the last level
    at = low.long() + top
    chances.index_add_(0, at, 1 - part).index_add_(0, at + 1, part)
    return torch.arange(-top, top + 1, dtype=torch.float64) * (CLIP / top), chances[:-1] / len(mean)
