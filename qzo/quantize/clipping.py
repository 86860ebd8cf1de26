"""The clipping bounds of a weight that lose least at its output: a search over the grid of every group, no gradients.

With e = Q(W; low, high) - W and H = XᵀX of the Linear's quantized inputs, ‖X eᵀ‖² = Σ_rows e H eᵀ. For one group g, with the errors of
the others fixed, it is quadratic in e_g alone:

    e_g H_gg e_gᵀ + 2 e_g r_gᵀ + const,   r_g = Σ_{g' ≠ g} e_g' H_g'g

Groups are visited in turn, some sweeps; all rows at once. Candidates: both bounds kept at one ratio, then each bound around the best.
"""

import torch
from qzo_kernels.reference_qat import bounded_grid, grouped, rounded
from torch import Tensor

RATIOS = [1 - 0.025 * i for i in range(28)]
AROUND = [1 + 0.025 * i for i in range(-6, 7) if i]
SWEEPS = 2
_LEAST, MOST = 0.05, 0.9997  # of ratios; a logit cannot hold 1, and 8 is 0.9997


def search_bounds(weight: Tensor, bits: int, group_size: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (low, high) fp32 [N, G] for weight fp32 [N, K], smoothed already, and inputs of second moment `hessian` fp32 [K, K], up to a factor."""
    cols = weight.shape[1]
    size = cols if group_size == -1 else group_size
    parts = [slice(a, min(a + size, cols)) for a in range(0, cols, size)]
    groups = grouped(weight, group_size)
    bounds = torch.stack((groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)))
    ratios = torch.full_like(bounds, MOST)
    error = torch.zeros_like(weight)
    for g, part in enumerate(parts):
        error[:, part] = _error(weight[:, part], bounds[..., g] * ratios[..., g], bits)
    for sweep in range(SWEEPS if len(parts) > 1 else 1):
        for g, part in enumerate(parts):
            own = hessian[part, part]
            rest = error @ hessian[:, part] - error[:, part] @ own
            ratios[..., g] = _search(weight[:, part], bounds[..., g], ratios[..., g], bits, own, rest, whole=not sweep)
            error[:, part] = _error(weight[:, part], bounds[..., g] * ratios[..., g], bits)
    return tuple(torch.logit(ratios))


def _search(weight: Tensor, bounds: Tensor, ratios: Tensor, bits: int, own: Tensor, rest: Tensor, whole: bool) -> Tensor:
    """The ratios [2, N] of one group that lose least, no worse than those given; `whole`: try all of RATIOS for both at once."""

    def loss(ratios: Tensor) -> Tensor:
        e = _error(weight, bounds * ratios, bits)
        return (e * (e @ own + 2 * rest)).sum(1)

    best, least = ratios, loss(ratios)

    def offer(ratios: Tensor) -> None:
        nonlocal best, least
        lost = loss(ratios)
        better = lost < least
        best, least = torch.where(better, ratios, best), torch.where(better, lost, least)

    for ratio in RATIOS if whole else []:
        offer(torch.full_like(ratios, ratio).clamp_(max=MOST))
    for side in 0, 1:
        centre = best
        for factor in AROUND:
            tried = centre.clone()
            tried[side] *= factor
            offer(tried.clamp_(_LEAST, MOST))
    return best


def _error(weight: Tensor, bounds: Tensor, bits: int) -> Tensor:
    """Q(W) - W of one group [N, g] whose range is bounds [2, N]."""
    step, zero = bounded_grid(bounds[0], bounds[1], bits)
    return rounded(weight, step[:, None], zero[:, None], bits).sub_(weight)
