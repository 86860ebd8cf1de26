"""Losses of perturbed weights in, coefficients out.

Two-sided SPSA (MeZO, arXiv 2305.17333) and directional derivative clipping (QZO, arXiv 2505.13430):

    d_i = (l+_i - l-_i) / 2 eps,   d'_i = clip(d_i, -C, C),   a_i = lr d'_i / n,   w <- w - sum_i a_i z_i

All in fp32 where the losses are, without waiting for them: the coefficients are journaled, and every device applies the same bits.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def projected_gradients(losses: Tensor, width: Tensor) -> Tensor:
    """losses fp32 [D, 2] (plus, minus), width fp32 [1] = 2 eps -> d fp32 [D]."""
    # A tensor, because CUDA multiplies by the reciprocal of a number.
    return (losses[:, 0] - losses[:, 1]) / width


class Clip:
    """Bound on |d|: a number `bound` (the paper's C), or `multiple` times the median of the last `WINDOW` recorded |d|.

    The median is a function of journaled values, so a replayed run clips alike. Until `WARMUP` values are known, or while
    the median is 0, the relative bound does not act. What was observed lies in one tensor, fp32 [WINDOW], in order; NaN: nothing yet.
    """

    WINDOW, WARMUP = 100, 10

    def __init__(self, bound: float | None = None, multiple: float | None = None):
        self.bound, self.multiple = bound, multiple
        self._recent = torch.full((self.WINDOW,), torch.nan)

    def to(self, device: torch.device) -> "Clip":
        self._recent = self._recent.to(device)
        return self

    def limit(self) -> Tensor:
        """The bound in force for the next step, fp32 scalar; infinity when there is none."""
        none = torch.full_like(self._recent[0], torch.inf)
        if self.bound is not None:
            return torch.full_like(none, self.bound)
        if self.multiple is None:
            return none
        known = self._recent.isfinite()
        count = known.sum().clamp(min=1)
        ordered = torch.where(known, self._recent, torch.inf).sort().values
        middle = torch.stack(((count - 1) >> 1, count >> 1))
        median = ordered[middle].sum() * 0.5
        acts = (known.sum() >= self.WARMUP) & (median > 0)
        return torch.where(acts, (median.double() * self.multiple).float(), none)

    def observe(self, projected: Tensor) -> None:
        """Take in the raw d of finished steps, fp32 [any], as the journal holds them."""
        both = torch.cat((self._recent, projected.to(self._recent.device).abs()))
        # A stable sort by "is a number" moves the last numbers to the end, in order.
        order = both.isfinite().to(torch.uint8).sort(stable=True).indices
        both = torch.where(both.isfinite(), both, torch.nan)
        self._recent.copy_(both[order[-self.WINDOW :]])

    def recent(self) -> list[float]:
        return [value for value in self._recent.tolist() if value == value]

    def restore(self, recent: Iterable[float]) -> None:
        self._recent.fill_(torch.nan)
        self.observe(torch.tensor(list(recent), dtype=torch.float32))


def coefficients(projected: Tensor, limit: Tensor, rates: Tensor, count: Tensor) -> Tensor:
    """a fp32 [groups, D]: one row per parameter group, rates fp32 [groups] their learning rates in units of d.

    projected fp32 [D], limit a scalar, count fp32 [1] = D. Where a d is not finite: zeros.
    """
    mean = torch.clamp(projected, -limit, limit) / count
    return torch.where(projected.isfinite().all(), rates[:, None] * mean, 0.0)
