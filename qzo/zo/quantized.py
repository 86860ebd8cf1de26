"""Quantized normals as directions of an estimate (QuZO, arXiv 2502.12346): what one level of the noise is worth.

    z ≈ u·4/L,   u = Q(z) in -L … L by stochastic rounding,   L = 2^(noise_bits - 1) - 1,   4 sigma at the last level
"""

import functools

import torch
from qzo_kernels.reference import normal_table
from qzo_kernels.reference_codes import CLIP


def _top(noise_bits: int) -> int:
    if not 2 <= noise_bits <= 8:
        raise ValueError(f"noise_bits = {noise_bits}: expected 2 to 8")
    return (1 << (noise_bits - 1)) - 1


@functools.cache
def gain(noise_bits: int) -> float:
    """E[(4u/L)²], exact: over the 65536 values of z and the chance of each rounding."""
    top = _top(noise_bits)
    n = normal_table().to(torch.int64) * top
    low, high, part = (n >> 14).clamp(-top, top), ((n >> 14) + 1).clamp(-top, top), n & 0x3FFF
    total = int((low**2 * ((1 << 14) - part) + high**2 * part).sum())
    return (CLIP / top) ** 2 * total / (len(n) << 14)


def unit(noise_bits: int, estimator: str) -> float:
    """What a learning rate is multiplied by, so that a coefficient is in noise levels: 4/L, for rge1 with its gain divided out."""
    if estimator not in ("rge1", "rge2"):
        raise ValueError(f"estimator: {estimator!r}; expected rge1 or rge2")
    return CLIP / _top(noise_bits) / (gain(noise_bits) if estimator == "rge1" else 1.0)
