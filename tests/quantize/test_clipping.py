"""The search over clipping bounds: never worse than no clipping, near the best of a brute-force grid, and by what reaches the output."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from qzo_kernels.reference_qat import clipped_grid, fake_quantize

from qzo.quantize.clipping import MOST, search_bounds


def inputs(rows: int, cols: int) -> torch.Tensor:
    """Correlated, of very different sizes."""
    torch.manual_seed(cols)
    return torch.randn(rows, cols) @ (torch.randn(cols, cols) / cols**0.5 + torch.eye(cols)) * torch.exp2(torch.rand(cols) * 4)


def lost(weight: torch.Tensor, bits: int, group_size: int, x: torch.Tensor, bounds: Sequence[torch.Tensor] | None) -> torch.Tensor:
    grid = clipped_grid(weight, bits, group_size, *(bounds or (None, None)))
    return ((fake_quantize(weight, *grid, bits, group_size) - weight) @ x.t()).square().sum(1)


@pytest.mark.parametrize(("cols", "group_size"), [(64, 16), (64, -1), (40, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_row_loses_less_at_its_output(bits, cols, group_size):
    x = inputs(200, cols)
    weight = torch.randn(24, cols) * torch.randn(24, 1).exp()
    bounds = search_bounds(weight, bits, group_size, x.t() @ x)
    assert all(b.shape == (24, 1 if group_size == -1 else -(-cols // group_size)) and b.isfinite().all() for b in bounds)
    widest = torch.tensor(MOST).logit()
    tried = (None, [torch.full_like(b, widest) for b in bounds], [torch.full_like(b, 3.0) for b in bounds], bounds)
    whole, almost, start, found = (lost(weight, bits, group_size, x, b) for b in tried)
    assert bool((found <= almost * 1.0001).all())
    means = [float((found / other).mean()) for other in (whole, start)]
    assert means[0] < {2: 0.55, 3: 0.7, 4: 0.9}[bits] and means[1] < 0.9


def test_one_group_is_close_to_the_best_of_all_pairs():
    x = inputs(100, 12)
    weight = torch.randn(8, 12)
    found = lost(weight, 3, -1, x, search_bounds(weight, 3, -1, x.t() @ x))
    ratios = torch.linspace(0.3, 0.9997, 40).logit()
    pairs = itertools.product(ratios, ratios)
    best = torch.stack([lost(weight, 3, -1, x, (torch.full((8, 1), float(a)), torch.full((8, 1), float(b)))) for a, b in pairs]).amin(0)
    assert float(found.sum()) < 1.35 * float(best.sum())


def test_groups_make_up_for_one_another():
    """Two groups of the same inputs: their errors meet at the output, so a search of each alone is worse."""
    half = inputs(200, 16)
    x = torch.cat((half, half), 1)
    weight = torch.randn(64, 32)
    together = search_bounds(weight, 2, 16, x.t() @ x)
    hessian = half.t() @ half
    alone = [torch.cat(pair, 1) for pair in zip(*(search_bounds(part, 2, -1, hessian) for part in weight.split(16, 1)), strict=True)]
    assert float(lost(weight, 2, 16, x, together).sum()) < 0.8 * float(lost(weight, 2, 16, x, tuple(alone)).sum())
