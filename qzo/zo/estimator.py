"""Losses of perturbed weights in, coefficients out.

Two-sided SPSA (MeZO, arXiv 2305.17333) and directional derivative clipping (QZO, arXiv 2505.13430):

    d_i = (l+_i - l-_i) / 2 eps,   d'_i = clip(d_i, -C, C),   a_i = lr d'_i / n,   w <- w - sum_i a_i z_i

All in fp32 on the host: the coefficients are journaled, and every device applies the same bits.
"""

from collections import deque

import numpy as np


def projected_gradients(losses: np.ndarray, eps: float) -> np.ndarray:
    """losses fp32 [D, 2] (plus, minus) -> d fp32 [D]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (losses[:, 0] - losses[:, 1]) / np.float32(2 * eps)


class Clip:
    """Bound on |d|: a number `bound` (the paper's C), or `multiple` times the median of the last `WINDOW` recorded |d|.

    The median is a function of journaled values, so a replayed run clips alike. Until `WARMUP` values are known,
    the relative bound does not act.
    """

    WINDOW, WARMUP = 100, 10

    def __init__(self, bound: float | None = None, multiple: float | None = None):
        self.bound, self.multiple = bound, multiple
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def limit(self) -> float:
        """The bound in force for the next step; infinity when there is none."""
        if self.bound is not None:
            return self.bound
        if self.multiple is None or len(self._recent) < self.WARMUP:
            return float("inf")
        median = float(np.median(np.array(self._recent, dtype=np.float32)))
        return self.multiple * median if median > 0 else float("inf")

    def observe(self, projected: np.ndarray) -> None:
        """Take in the raw d of a finished step, as the journal holds them."""
        self._recent.extend(abs(float(d)) for d in projected if np.isfinite(d))

    def recent(self) -> list[float]:
        return list(self._recent)

    def restore(self, recent: list[float]) -> None:
        self._recent = deque(recent, maxlen=self.WINDOW)


def coefficients(projected: np.ndarray, limit: float, rates: list[float]) -> np.ndarray:
    """a fp32 [groups, D]: one row per parameter group, `rates` its learning rate in units of d. Not finite -> zeros."""
    if not np.isfinite(projected).all():
        return np.zeros((len(rates), len(projected)), np.float32)
    clipped = np.clip(projected, np.float32(-limit), np.float32(limit))
    scaled = np.array(rates, np.float32)[:, None] * (clipped / np.float32(len(projected)))[None, :]
    return scaled.astype(np.float32)
