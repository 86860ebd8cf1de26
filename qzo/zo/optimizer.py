"""ZO: a torch Optimizer whose step needs forwards only.

    optimizer = ZO([Scales(layers, eps=0.03, lr=0.01)], seed=0)
    loss = optimizer.step(closure)        # closure() -> the loss under whatever weights the forward sees
    optimizer.last                        # what the step measured and applied

The weights are never written while a step is measured; the update is one pass at its end. Nothing in a step waits for the
device: what it measured is read afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qzo.zo.estimator import Clip, coefficients, projected_gradients
from qzo.zo.noise import Variants, variants
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


class Measured:
    """A step under way: `read` waits for it. Its numbers travel to the host while the device goes on."""

    def __init__(self, step: int, directions: int, record: Tensor):
        self.step, self.directions = step, directions
        self._values = torch.empty(record.shape, pin_memory=record.is_cuda)
        self._values.copy_(record, non_blocking=True)
        self._arrived = torch.cuda.current_stream(record.device).record_event() if record.is_cuda else None

    def read(self) -> Step:
        if self._arrived:
            self._arrived.synchronize()
        loss, clipped, skipped, *_ = values = self._values.numpy().copy()
        projected, coefs = values[3 : 3 + self.directions], values[3 + self.directions :].reshape(-1, self.directions)
        return Step(self.step, loss, projected, coefs, bool(clipped), bool(skipped))


class ZO(torch.optim.Optimizer):
    """Two-sided SPSA over `targets`; param_groups hold each target's lr and may be scheduled by torch.

    seed: run seed of the noise. directions: D, averaged. clip: a bound on |d| (d in units of the first target's eps).
    stacked: both signs in one forward; the closure is then called with the number of variants V and returns
    losses [V] for inputs repeated V times along the batch. A step with a non-finite loss changes nothing.
    device: where losses are and updates are done, if not where the first parameter is. Raises ValueError for anything but targets.
    """

    def __init__(
        self, targets: Sequence[Target], seed: int = 0, directions: int = 1,
        clip: Clip | None = None, stacked: bool = False, device: torch.device | None = None,
    ):  # fmt: skip
        _check(targets)
        groups = [{"params": t.parameters(), "lr": t.lr, "name": t.name} for t in targets]
        super().__init__(groups, {})
        self.targets, self.seed, self.directions, self.stacked = list(targets), seed, directions, stacked
        self.device = device or targets[0].parameters()[0].device
        self.clip = (clip or Clip()).to(self.device)
        self.steps = 0
        self.newest: Measured | None = None
        pairs = [(direction, sign) for direction in range(directions) for sign in (1, -1)]
        # All that changes from step to step, at fixed places of the device.
        self._noise = variants(seed, 0, pairs, self.device)
        self._at = torch.zeros(2, dtype=torch.int64, device=self.device)  # seed, step
        self._numbers = torch.zeros(2 + len(groups), device=self.device)  # 2 eps, D, rates
        self._record = torch.zeros(3 + directions * (1 + len(groups)), device=self.device)

    @property
    def last(self) -> Step | None:
        """The newest step, once it is done; None before the first."""
        return self.newest and self.newest.read()

    @torch.no_grad()
    def losses(self, closure: Callable, step: int, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The losses fp32 [len(pairs)] of (direction, sign) pairs at `step`; writes no tensor of the model."""
        return self._measure(closure, variants(self.seed, step, pairs, self.device))

    def _measure(self, closure: Callable, noise: Variants) -> Tensor:
        measured = []
        for part in [noise] if self.stacked else _one_by_one(noise):
            with ExitStack() as stack:
                for target in self.targets:
                    stack.enter_context(target.entered(part))
                count = len(part.signs)
                loss = closure(count) if self.stacked else closure()
                measured.append(loss.reshape(count).to(self.device, torch.float32))
        return torch.cat(measured)

    def step(self, closure: Callable) -> Tensor:
        """One step; returns the mean loss of its forwards, fp32 scalar on the device. `last` holds what was done."""
        return self.around(lambda: self.work(closure))

    @torch.no_grad()
    def around(self, work: Callable[[], None]) -> Tensor:
        """A step whose device part is done by `work()`: by calling `self.work`, or by replaying what it once did."""
        eps = self.targets[0].eps
        rates = [g["lr"] * eps / t.eps * t.unit for g, t in zip(self.param_groups, self.targets, strict=True)]
        _upload(torch.tensor([self.seed, self.steps]), self._at)
        _upload(torch.tensor([2 * eps, self.directions, *rates], dtype=torch.float32), self._numbers)
        work()
        self.newest = Measured(self.steps, self.directions, self._record)
        self.steps += 1
        return self._record[0].clone()

    @torch.no_grad()
    def work(self, closure: Callable) -> None:
        """What the device does in a step: the same operations on the same tensors every time, no value read by the host."""
        self._noise.states[:, 1].copy_(self._at[1])
        losses = self._measure(closure, self._noise)
        width, count, rates = self._numbers.tensor_split((1, 2))
        projected, limit = projected_gradients(losses.view(-1, 2), width), self.clip.limit()
        coefs = coefficients(projected, limit, rates, count)
        for target, row in zip(self.targets, coefs, strict=True):
            target.apply(self._at, row[None])
        flags = torch.stack(((projected.abs() > limit).any(), ~projected.isfinite().all()))
        self._record.copy_(torch.cat((losses.mean()[None], flags.float(), projected, coefs.flatten())))
        self.clip.observe(projected)

    def state_dict(self) -> dict:
        """Torch's own, and the step counter with the recent |d|; the tuned tensors belong to the model."""
        return {**super().state_dict(), "zo": {"steps": self.steps, "recent": self.clip.recent()}}

    def load_state_dict(self, state_dict: dict) -> None:
        own = state_dict["zo"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self.steps = own["steps"]
        self.clip.restore(own["recent"])


def _check(targets: Sequence[Target]) -> None:
    given = type(targets).__name__
    if isinstance(targets, list | tuple):
        given = next((type(target).__name__ for target in targets if not hasattr(target, "entered")), "" if targets else "an empty list")
    if given:
        raise ValueError(f"ZO: given {given}; expected a list of targets: qzo.ZO([qzo.Scales(qzo.prepare(model), eps=..., lr=...)])")


def _one_by_one(noise: Variants) -> Iterator[Variants]:
    for state, sign in zip(noise.states.split(1), noise.signs.split(1), strict=True):
        yield Variants(state, sign)


def _upload(values: Tensor, out: Tensor) -> None:
    """Copy host numbers to the device without waiting; torch keeps pinned memory from reuse until the copy is done."""
    out.copy_(values.pin_memory() if out.is_cuda else values, non_blocking=True)
