"""Which way `quant_matmul` goes, and with which launch: a small table per family of devices, by shape and nothing else.

The table is frozen: nothing is chosen by timing in a run, so a run repeats bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels.pack import TILE

ROUTES = ("fused", "dequantize")


class Config(NamedTuple):
    """A launch: tiles of `rows_n` rows of the weight × `rows_m` rows of x, `splits` of K, warps, pipeline stages."""

    rows_n: int
    rows_m: int
    splits: int
    warps: int
    stages: int


# For up to so many rows of x: tile, programs to reach by splitting K (below _LONG blocks of 128 columns; from there), warps, stages.
# Measured on an H200 (scripts/bench_kernels); beyond the last line dequantizing and a dense product are faster.
_HOPPER = (
    (16, 128, 16, 320, 640, 4, 4),
    (32, 64, 32, 264, 264, 4, 4),
    (64, 64, 64, 264, 264, 4, 3),
    (384, 64, 128, 330, 480, 4, 3),
)
_LONG = 80
_SPLITS = 8  # of K, at most
_SLOTS = 16  # variants of a tile, at most: a thread holds the signs of all of them for its two rows of the weight
_NARROW = 8192  # up to so many rows of the weight, tiles of 64 of them: 128 leave multiprocessors without one
_FILLED = 200  # programs of tiles of 128 rows of x that fill the device; with fewer, and K short, tiles of 64 rows


def _row(rows: int) -> tuple | None:
    return next((row for row in _HOPPER if rows <= row[0]), None)


def part_width(bits: int, group_size: int, cols: int) -> int:
    """Columns of one product of the fused kernel: of a block of 128, those sure to share a group. 0: too few for it."""
    width = TILE if group_size >= cols else min(TILE, group_size & -group_size)
    return width if width >= (64 if bits == 8 else 32) else 0


def slots_of(per_variant: int, variants: int, rows_m: int) -> int:
    """Variants that share a tile of rows_m rows, each a power of two of them, or 1: two of many rows have an accumulator each."""
    slots = rows_m // per_variant
    fits = (variants > 2 or rows_m <= 16) and per_variant & (per_variant - 1) == 0 and 2 <= slots <= _SLOTS
    return slots if fits else 1


def takes_fused(per_variant: int, dtype: torch.dtype, bits: int, group_size: int, cols: int) -> bool:
    """Whether so many rows of x per variant go through the fused kernel on a GPU. Devices that were not measured take Hopper's table."""
    return dtype != torch.float32 and part_width(bits, group_size, cols) > 0 and _row(per_variant) is not None


def route_of(x: Tensor, bits: int, group_size: int, noise, codebook: Tensor | None = None) -> str:
    """The route for x [M, K] under `noise`. The fused kernel takes no codebook."""
    per_variant = len(x) // (1 if noise is None else len(noise.eps))
    return "fused" if x.is_cuda and codebook is None and takes_fused(per_variant, x.dtype, bits, group_size, x.shape[1]) else "dequantize"


def config_of(x: Tensor, rows: int, noise) -> Config:
    """The fused kernel's launch for x [M, K] and `rows` rows of the weight."""
    variants = 1 if noise is None else len(noise.eps)
    per_variant = len(x) // variants
    # A tile takes several small variants: as many as have slots, or else a pair.
    shared = min(variants, _SLOTS) if per_variant & (per_variant - 1) == 0 else min(variants, 2)
    _, rows_n, rows_m, short, long, warps, stages = _row(per_variant * shared) or _HOPPER[-1]
    if rows <= _NARROW:
        rows_n = 64

    def tiles() -> int:
        if slots_of(per_variant, variants, rows_m) > 1:
            return -(-rows // rows_n) * -(-len(x) // rows_m)
        pairs = 2 * per_variant <= rows_m
        return -(-rows // rows_n) * (-(-variants // 2) if pairs else variants * -(-per_variant // rows_m))

    far = x.shape[1] >= _LONG * TILE
    programs = long if far else short
    if rows_m == 128 and tiles() < _FILLED and (not far or slots_of(per_variant, variants, rows_m) > 1):
        rows_m, programs = 64, short * (1 + far)
    return Config(rows_n, rows_m, max(1, min(_SPLITS, programs // tiles())), warps, stages)
