"""Triton kernels of `perturb` and `update_`: one pass over f32 [rows, cols], the noise made in registers.

Compiled without floating-point contraction, so that with Rademacher z every device computes the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels import noise

_TILE = 2048  # elements per program; frozen like every launch setting: nothing is chosen by timing in a run


@triton.jit
def _place(rows, cols, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(row [ROWS] int64, first column, offsets [ROWS, WIDTH] int64, mask) of this program's tile."""
    across = tl.cdiv(cols, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * WIDTH
    col = first + tl.arange(0, WIDTH)
    return row, first, row[:, None] * cols + col[None, :], (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def _noise(seed, step, direction, uid, row, first, cols, GAUSSIAN: tl.constexpr, WIDTH: tl.constexpr):
    if GAUSSIAN:
        z = noise.gaussian(seed, step, direction, uid, row, first, cols, WIDTH)
    else:
        z = noise.rademacher(seed, step, direction, uid, row, first, cols, WIDTH)
    return z


@triton.jit(do_not_specialize=["uid"])
def _perturb_kernel(
    p_out, p_values, p_state, p_eps, rows, units, uid, floor, UNIT: tl.constexpr,
    RELATIVE: tl.constexpr, GAUSSIAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    cols = units * UNIT
    row, first, offsets, mask = _place(rows, cols, ROWS, WIDTH)
    variant = tl.program_id(1)
    p_state += variant * 3
    p_out += tl.cast(rows, tl.int64) * cols * variant
    v = tl.load(p_values + offsets, mask=mask)
    eps = tl.load(p_eps + variant)
    z = _noise(tl.load(p_state), tl.load(p_state + 1), tl.load(p_state + 2), uid, row, first, cols, GAUSSIAN, WIDTH)
    tl.store(p_out + offsets, noise.moved(v, z, eps, floor, RELATIVE), mask=mask)


@triton.jit(do_not_specialize=["uid"])
def _update_kernel(
    p_values, p_state, p_coefs, rows, units, uid, floor, UNIT: tl.constexpr,
    STEPS: tl.constexpr, DIRECTIONS: tl.constexpr, RELATIVE: tl.constexpr, GAUSSIAN: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    cols = units * UNIT
    row, first, offsets, mask = _place(rows, cols, ROWS, WIDTH)
    v = tl.load(p_values + offsets, mask=mask)
    seed = tl.load(p_state)
    first_step = tl.load(p_state + 1)
    for s in range(STEPS):
        c = tl.zeros((ROWS, WIDTH), tl.float32)
        for direction in range(DIRECTIONS):
            z = _noise(seed, first_step + s, direction, uid, row, first, cols, GAUSSIAN, WIDTH)
            c += tl.load(p_coefs + s * DIRECTIONS + direction) * z
        if RELATIVE:
            moved = v * (1.0 - c)
        else:
            moved = v - c
        v = tl.where(moved < floor, floor, moved)
    tl.store(p_values + offsets, v, mask=mask)


def _geometry(values: Tensor, gaussian: bool) -> tuple[int, tuple[int, int], dict[str, int]]:
    """(tiles, (rows, units), constants). A tile of Rademacher noise lies in one block of 128 columns.

    Columns are counted in units of up to four: rows of 40 scales are then known to be aligned for loads of 16 bytes.
    """
    rows, cols = values.shape
    width = min(512 if gaussian else 128, max(4, triton.next_power_of_2(cols)))
    height = min(_TILE // width, triton.next_power_of_2(rows))
    unit = math.gcd(cols, 4)
    tiles = triton.cdiv(rows, height) * triton.cdiv(cols, width)
    return tiles, (rows, cols // unit), {"UNIT": unit, "ROWS": height, "WIDTH": width}


def launch_perturb(
    values: Tensor, state: Tensor, eps: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> Tensor:
    """`reference.perturb` on the values' device; arguments as checked by ops.py."""
    out = torch.empty(len(eps), *values.shape, dtype=torch.float32, device=values.device)
    tiles, shape, constants = _geometry(values, gaussian)
    with torch.cuda.device_of(values):
        _perturb_kernel[(tiles, len(eps))](
            out, values, state, eps, *shape, noise.signed(uid), floor,
            RELATIVE=relative, GAUSSIAN=gaussian, **constants, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def launch_update(
    values: Tensor, state: Tensor, coefs: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> None:
    """`reference.update_` on the values' device; arguments as checked by ops.py."""
    tiles, shape, constants = _geometry(values, gaussian)
    with torch.cuda.device_of(values):
        _update_kernel[(tiles,)](
            values, state, coefs, *shape, noise.signed(uid), floor,
            STEPS=coefs.shape[0], DIRECTIONS=coefs.shape[1], RELATIVE=relative, GAUSSIAN=gaussian, **constants, enable_fp_fusion=False,
        )  # fmt: skip
