"""Quantized normal noise in numbers (QuZO, arXiv 2502.12346): levels, gains. Replaced by the merge of issue5-c."""

from functools import cache

import torch
from qzo_kernels.reference_codes import CLIP
from qzo_kernels.reference_noise import normal_table

STREAMS = {"rge1": 1, "rge2": 2}  # the rounding that an update uses; forwards use 1


def level(noise_bits: int) -> float:
    """Standard deviations per level."""
    return CLIP / ((1 << (noise_bits - 1)) - 1)


@cache
def gain(noise_bits: int) -> float:
    top = (1 << (noise_bits - 1)) - 1
    n = normal_table().long() * top
    low, part = (n >> 14).clamp(-top, top).double(), (n & 0x3FFF).double() / (1 << 14)
    high = ((n >> 14) + 1).clamp(-top, top).double()
    return float((low**2 * (1 - part) + high**2 * part).mean()) * level(noise_bits) ** 2


def unit(noise_bits: int, estimator: str) -> float:
    return level(noise_bits) / (gain(noise_bits) if estimator == "rge1" else 1.0)


@cache
def mean_move(noise_bits: int) -> float:
    top = (1 << (noise_bits - 1)) - 1
    n = normal_table().long() * top
    low, part = (n >> 14).clamp(-top, top).double(), (n & 0x3FFF).double() / (1 << 14)
    high = ((n >> 14) + 1).clamp(-top, top).double()
    return float((low.abs() * (1 - part) + high.abs() * part).mean()) * level(noise_bits)
