"""ZO: a torch Optimizer whose step needs forwards only.

    optimizer = ZO([Scales(layers, eps=0.03, lr=0.01)], seed=0)
    loss = optimizer.step(closure)        # closure() -> the loss under whatever weights the forward sees

The weights are never written while a step is measured; the update is one pass at its end.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from qzo.zo.estimator import Clip, coefficients, projected_gradients
from qzo.zo.noise import variants
from qzo.zo.targets import Target


@dataclass(frozen=True)
class Step:
    """What one step measured and applied: loss (mean of all forwards), projected fp32 [D] raw, coefs fp32 [groups, D]."""

    step: int
    loss: np.float32
    projected: np.ndarray
    coefs: np.ndarray
    clipped: bool
    skipped: bool


class ZO(torch.optim.Optimizer):
    """Two-sided SPSA over `targets`; param_groups hold each target's lr and may be scheduled by torch.

    seed: run seed of the noise. directions: D, averaged. clip: a bound on |d| (d in units of the first target's eps).
    stacked: both signs in one forward; the closure is then called with the number of variants V and returns
    losses [V] for inputs repeated V times along the batch. A step with a non-finite loss changes nothing.
    """

    def __init__(
        self, targets: Sequence[Target], seed: int = 0, directions: int = 1,
        clip: Clip | None = None, stacked: bool = False,
    ):  # fmt: skip
        groups = [{"params": t.parameters(), "lr": t.lr, "name": t.name} for t in targets]
        super().__init__(groups, {})
        self.targets, self.seed, self.directions = list(targets), seed, directions
        self.clip, self.stacked = clip or Clip(), stacked
        self.steps = 0
        self.last: Step | None = None
        self.device = targets[0].parameters()[0].device

    @torch.no_grad()
    def losses(self, closure: Callable, step: int, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The losses fp32 [len(pairs)] of (direction, sign) pairs at `step`; writes no tensor of the model."""
        measured = []
        for group in [pairs] if self.stacked else [[pair] for pair in pairs]:
            noise = variants(self.seed, step, group, self.device)
            with ExitStack() as stack:
                for target in self.targets:
                    stack.enter_context(target.entered(noise))
                measured.append((closure(len(group)) if self.stacked else closure()).reshape(len(group)).float())
        return torch.cat(measured)

    @torch.no_grad()
    def step(self, closure: Callable) -> torch.Tensor:
        """One step; returns the mean loss of its forwards, fp32 scalar on the CPU. `last` holds what was done."""
        pairs = [(direction, sign) for direction in range(self.directions) for sign in (1, -1)]
        losses = self.losses(closure, self.steps, pairs).cpu()
        projected = projected_gradients(losses.view(self.directions, 2).numpy(), self.targets[0].eps)
        limit = self.clip.limit()
        rates = [g["lr"] * self.targets[0].eps / t.eps for g, t in zip(self.param_groups, self.targets, strict=True)]
        coefs = coefficients(projected, limit, rates)
        self.last = Step(
            self.steps, np.float32(losses.mean().item()), projected, coefs,
            bool((np.abs(projected) > limit).any()), not bool(np.isfinite(projected).all()),
        )  # fmt: skip
        self._apply(projected, coefs)
        return losses.mean()

    @torch.no_grad()
    def _apply(self, projected: np.ndarray, coefs: np.ndarray) -> None:
        state = torch.tensor([self.seed, self.steps], dtype=torch.int64, device=self.device)
        for target, row in zip(self.targets, torch.from_numpy(coefs), strict=True):
            target.apply(state, row[None].to(self.device))
        self.clip.observe(projected)
        self.steps += 1

    def state_dict(self) -> dict:
        """Torch's own, and the step counter with the recent |d|; the tuned tensors belong to the model."""
        return {**super().state_dict(), "zo": {"steps": self.steps, "recent": self.clip.recent()}}

    def load_state_dict(self, state_dict: dict) -> None:
        own = state_dict["zo"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self.steps = own["steps"]
        self.clip.restore(own["recent"])
