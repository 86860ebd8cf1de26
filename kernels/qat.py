"""Triton kernels of `effective_weight` and `update_latent_`: one pass over a latent weight, the noise made in registers.

A tile reads its weights once and serves every variant or step. Compiled without floating-point contraction, with IEEE division and ties
to even, so that with Rademacher noise every device computes the reference's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo_kernels import noise
from qzo_kernels.reference_qat import LatentNoise, Realized

_WIDTH = 128  # columns of a tile, at most: one Philox call of Rademacher noise per row
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # whose fma rounds twice
# Elements of a tile and warps, by the size of the weight from which they are taken: small weights need many programs. Of the tiles timed
# for large ones (8 or 16 elements per thread, 2 to 16 warps) the fastest of all three kernels.
_TILES = {1 << 19: (1024, 2), 0: (512, 2)}


@triton.jit
def _place(N, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(row [ROWS] int64, first column, column [WIDTH], offsets [ROWS, WIDTH] int64, mask) of this program's tile."""
    across = tl.cdiv(K, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * WIDTH
    col = first + tl.arange(0, WIDTH)
    return row, first, col, row[:, None] * K + col[None, :], (row < N)[:, None] & (col < K)[None, :]


@triton.jit
def _by_group(p, row, first, col, N, K, groups, GROUP: tl.constexpr, ONE: tl.constexpr):
    """f32 [N, G] at the tile: [ROWS, 1] where it lies in one group, else [ROWS, WIDTH]."""
    if ONE:
        values = tl.load(p + row * groups + first // GROUP, mask=row < N, other=1.0)[:, None]
    else:
        mask = (row < N)[:, None] & (col < K)[None, :]
        values = tl.load(p + row[:, None] * groups + (col // GROUP)[None, :], mask=mask, other=1.0)
    return values


@triton.jit
def _unit(
    p_rows, p_cols, row, first, col, N, K, groups, GROUP: tl.constexpr, ONE: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr
):
    """f32 that broadcasts to the tile: rows[n, g]·cols[k], 1 for what is not there."""
    unit = tl.full((1, 1), 1.0, tl.float32)
    if BY_ROW:
        unit = _by_group(p_rows, row, first, col, N, K, groups, GROUP, ONE)
    if BY_COL:
        cols = tl.load(p_cols + col, mask=col < K, other=1.0)[None, :]
        unit = unit * cols if BY_ROW else cols
    return unit


@triton.jit
def _direction(unit, seed, step, direction, uid, row, first, K, GAUSSIAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """f32 [ROWS, WIDTH]: unit·u."""
    if GAUSSIAN:
        moved = unit * noise.gaussian(seed, step, direction, uid, row, first, K, WIDTH)
    else:
        moved = unit * noise.rademacher(seed, step, direction, uid, row, first, K, WIDTH)
    return moved


@triton.jit
def _quotient(w, d, inverse):
    """w / d as IEEE division rounds it, from the rounded 1 / d that many w share: two corrections by an exact remainder (Markstein 1990).

    Below 2⁻¹⁰⁰ a remainder may not be exact; there the code does not depend on it.
    """
    if _INTERPRETED:
        q = tl.div_rn(w, d)
    else:
        first = w * inverse
        q = tl.fma(tl.fma(-first, d, w), inverse, first)
        q = tl.fma(tl.fma(-q, d, w), inverse, q)
        q = tl.where(tl.abs(first) == float("inf"), first, q)
    return q


@triton.jit
def _steps(w, grid, inverses, TOP: tl.constexpr, S_IN: tl.constexpr, S_OUT: tl.constexpr):
    """Code less zero, f32, of a latent w: cut off before it is rounded, to whole numbers, which comes to the same."""
    step, zero, s_in, s_out = grid
    if S_IN:
        w = w * s_in
    if S_OUT:
        w = _quotient(w, s_out, inverses[1])
    q = _quotient(w, step, inverses[0])
    q = tl.maximum(q, -zero, propagate_nan=tl.PropagateNan.ALL)
    q = tl.minimum(q, TOP - zero, propagate_nan=tl.PropagateNan.ALL)
    return (q + 12582912.0) - 12582912.0  # 1.5 · 2²³: the sum's last bit is worth 1


@triton.jit
def _grid(
    p_step, p_zero, p_s_in, p_s_out, row, first, col, N, K, groups,
    GROUP: tl.constexpr, ONE: tl.constexpr, S_IN: tl.constexpr, S_OUT: tl.constexpr,
):  # fmt: skip
    """(step, zero, s_in, s_out), each of a shape that broadcasts to the tile."""
    step = _by_group(p_step, row, first, col, N, K, groups, GROUP, ONE)
    zero = _by_group(p_zero, row, first, col, N, K, groups, GROUP, ONE)
    s_in = tl.full((1, 1), 1.0, tl.float32)
    s_out = s_in
    if S_IN:
        s_in = tl.load(p_s_in + col, mask=col < K, other=1.0)[None, :]
    if S_OUT:
        s_out = tl.load(p_s_out + row, mask=row < N, other=1.0)[:, None]
    return step, zero, s_in, s_out


@triton.jit
def _inverted(grid):
    """(1 / step, 1 / s_out): apart, since it waits for the loads of the grid."""
    one = tl.full((1, 1), 1.0, tl.float32)
    return tl.div_rn(one, grid[0]), tl.div_rn(one, grid[3])


@triton.jit(do_not_specialize=["uid", "variants"])
def _effective_kernel(
    p_out, p_weight, p_step, p_zero, p_s_in, p_s_out, p_states, p_eps, p_rows, p_cols, N, K, groups, variants, uid,
    TOP: tl.constexpr, GROUP: tl.constexpr, ONE: tl.constexpr, S_IN: tl.constexpr, S_OUT: tl.constexpr, NOISE: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COL: tl.constexpr, GAUSSIAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, first, col, offsets, mask = _place(N, K, ROWS, WIDTH)
    w = tl.load(p_weight + offsets, mask=mask, other=0).to(tl.float32)
    grid = _grid(p_step, p_zero, p_s_in, p_s_out, row, first, col, N, K, groups, GROUP, ONE, S_IN, S_OUT)
    p_out += offsets
    if NOISE:
        unit = _unit(p_rows, p_cols, row, first, col, N, K, groups, GROUP, ONE, BY_ROW, BY_COL)
        seed, at, direction = tl.load(p_states), tl.load(p_states + 1), tl.load(p_states + 2)
        moved = _direction(unit, seed, at, direction, uid, row, first, K, GAUSSIAN, ROWS, WIDTH)
        inverses = _inverted(grid)
        for v in range(variants):
            p_state = p_states + v * 3
            before = seed, at, direction
            seed, at, direction = tl.load(p_state), tl.load(p_state + 1), tl.load(p_state + 2)
            # Both signs of a direction stand side by side: its noise is made once.
            if (seed != before[0]) | (at != before[1]) | (direction != before[2]):
                moved = _direction(unit, seed, at, direction, uid, row, first, K, GAUSSIAN, ROWS, WIDTH)
            seen = _steps(w + moved * tl.load(p_eps + v), grid, inverses, TOP, S_IN, S_OUT) * grid[0]
            tl.store(p_out, seen.to(p_out.dtype.element_ty), mask=mask)
            p_out += tl.cast(N, tl.int64) * K
    else:
        seen = _steps(w, grid, _inverted(grid), TOP, S_IN, S_OUT) * grid[0]
        tl.store(p_out, seen.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["uid", "steps", "directions"])
def _update_kernel(
    p_weight, p_state, p_coefs, p_step, p_zero, p_s_in, p_s_out, p_rows, p_cols, N, K, groups, steps, directions, uid, eps,
    TOP: tl.constexpr, GROUP: tl.constexpr, ONE: tl.constexpr, S_IN: tl.constexpr, S_OUT: tl.constexpr, REALIZED: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COL: tl.constexpr, GAUSSIAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, first, col, offsets, mask = _place(N, K, ROWS, WIDTH)
    w = tl.load(p_weight + offsets, mask=mask, other=0)
    unit = _unit(p_rows, p_cols, row, first, col, N, K, groups, GROUP, ONE, BY_ROW, BY_COL)
    if REALIZED:
        grid = _grid(p_step, p_zero, p_s_in, p_s_out, row, first, col, N, K, groups, GROUP, ONE, S_IN, S_OUT)
        inverses = _inverted(grid)
    seed, at = tl.load(p_state), tl.load(p_state + 1)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    # One loop: in the inner of two, a thread would hold eight rows of noise instead of two, and draw the words of each.
    for i in range(steps * directions):
        direction = i % directions
        c = tl.load(p_coefs + i)
        moved = _direction(unit, seed, at + i // directions, direction, uid, row, first, K, GAUSSIAN, ROWS, WIDTH)
        if REALIZED:
            plus = _steps(w + moved * eps, grid, inverses, TOP, S_IN, S_OUT)
            minus = _steps(w - moved * eps, grid, inverses, TOP, S_IN, S_OUT)
            moved = unit * tl.div_rn(plus - minus, eps * 2)
        total = tl.where(direction == 0, 0.0, total) + tl.where(c != 0.0, moved * c, 0.0)
        w = tl.where(direction == directions - 1, w - total, w)
    tl.store(p_weight + offsets, w, mask=mask)


def _geometry(weight: Tensor, group_size: int) -> tuple[int, dict[str, int]]:
    """(tiles, constants of the launch): tiles of at most 128 columns, within one block of Rademacher noise."""
    rows, cols = weight.shape
    size, warps = next(tile for least, tile in _TILES.items() if weight.numel() >= least)
    width = min(_WIDTH, max(4, triton.next_power_of_2(cols)))
    height = min(size // width, triton.next_power_of_2(rows))
    group = 1 << 30 if group_size == -1 else min(group_size, 1 << 30)
    constants = {"GROUP": group, "ONE": group >= cols or group % width == 0, "ROWS": height, "WIDTH": width, "num_warps": warps}
    return triton.cdiv(rows, height) * triton.cdiv(cols, width), constants


def launch_effective_weight(
    weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype, s_in: Tensor | None = None,
    s_out: Tensor | None = None, latent: LatentNoise | None = None,
) -> Tensor:  # fmt: skip
    """`reference_qat.effective_weight` on the weight's device; arguments as checked by ops_qat.py."""
    states, eps, uid, rows, cols, gaussian = latent or (None, None, 0, None, None, False)
    variants = 1 if eps is None else len(eps)
    out = torch.empty(variants, *weight.shape, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    tiles, constants = _geometry(weight, group_size)
    with torch.cuda.device_of(weight):
        _effective_kernel[(tiles,)](
            out, weight, step, zero, s_in, s_out, states, eps, rows, cols, *weight.shape, step.shape[1], variants, noise.signed(uid),
            TOP=(1 << bits) - 1, S_IN=s_in is not None, S_OUT=s_out is not None, NOISE=eps is not None,
            BY_ROW=rows is not None, BY_COL=cols is not None, GAUSSIAN=gaussian, **constants, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def launch_update_latent(
    weight: Tensor, state: Tensor, coefs: Tensor, uid: int, group_size: int, rows: Tensor | None, cols: Tensor | None, gaussian: bool,
    realized: Realized | None = None,
) -> None:  # fmt: skip
    """`reference_qat.update_latent_` on the weight's device; arguments as checked by ops_qat.py."""
    if not weight.numel() or not coefs.numel():
        return
    step, zero, bits, s_in, s_out, eps = realized or (None, None, 0, None, None, 0.0)
    tiles, constants = _geometry(weight, group_size)
    groups = 1 if group_size == -1 else triton.cdiv(weight.shape[1], group_size)
    with torch.cuda.device_of(weight):
        _update_kernel[(tiles,)](
            weight, state, coefs, step, zero, s_in, s_out, rows, cols, *weight.shape, groups, *coefs.shape, noise.signed(uid), eps,
            TOP=(1 << bits) - 1, S_IN=s_in is not None, S_OUT=s_out is not None, REALIZED=realized is not None,
            BY_ROW=rows is not None, BY_COL=cols is not None, GAUSSIAN=gaussian, **constants, enable_fp_fusion=False,
        )  # fmt: skip
