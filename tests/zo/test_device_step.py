"""A step as the device sees it: no value read by the host, and the same through a captured graph as without one."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qzo.zo import graph as module
from qzo.zo.estimator import Clip
from qzo.zo.graph import Captured, Graphs
from qzo.zo.optimizer import ZO


class Toy:
    """A target in plain torch: w + eps sign (step + 1) (direction + 1) v, moved by coefs along v."""

    name, relative, gaussian, unit = "toy", False, False, 1.0

    def __init__(self, size: int = 5, eps: float = 0.125, lr: float = 2**-14):
        self.eps, self.lr = eps, lr
        self.w, self.v = nn.Parameter(torch.zeros(size), requires_grad=False), torch.arange(1.0, size + 1)
        self.seen = self.w[None]

    def parameters(self):
        return [self.w]

    @contextmanager
    def entered(self, variants):
        scale = variants.signs * self.eps * (variants.states[:, 1] + 1) * (variants.states[:, 2] + 1)
        self.seen = self.w + scale[:, None] * self.v
        yield
        self.seen = self.w[None]

    def apply(self, state, coefs):
        self.w.data.sub_(coefs.sum() * self.v * (state[1] + 1))


@dataclasses.dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    note: str = ""


def make_batch(step: int, rows: int = 3) -> Batch:
    return Batch(torch.randn(rows, 5, generator=torch.Generator().manual_seed(step)), f"step {step}")


def loss_of(target):
    return lambda batches, variants: sum((target.seen @ b.x.T - 1).square().mean(1) for b in batches)


def make(stacked=False, directions=2, clip=None):
    target = Toy()
    optimizer = ZO([target], seed=3, directions=directions, clip=clip or Clip(multiple=1.5), stacked=stacked)
    return target, optimizer


class Replayed(Graphs):
    """Graphs on a CPU: what a capture records is run by the replay."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.capture, self.captures, self.replays = True, 0, 0

    def _capture(self, batches):
        self.captures += 1
        static = [dataclasses.replace(b, x=b.x.clone()) for b in batches]
        graphs = self

        class Recorded:
            def replay(self):
                graphs.replays += 1
                graphs._eager(static)

            def reset(self):
                static.clear()

        return Captured(Recorded(), static)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("clip", [Clip(multiple=1.5), Clip(bound=2.0), Clip()], ids=["median", "bound", "none"])
def test_nothing_in_a_step_is_read_by_the_host(stacked, clip):
    with FakeTensorMode():
        target, optimizer = make(stacked, clip=Clip(clip.bound, clip.multiple))
        batch = make_batch(0)
        loss = Graphs(optimizer, loss_of(target)).step([batch])
        assert loss.shape == () and optimizer.steps == 1
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("stacked", [False, True])
def test_replays_are_the_steps_themselves(stacked):
    """Batches of two shapes in turn: the first step of each is eager, the second captured, the others replayed."""
    outcomes = []
    for kind in (Graphs, Replayed):
        target, optimizer = make(stacked)
        graphs, steps = kind(optimizer, loss_of(target)), []
        for step in range(20):
            loss = graphs.step([make_batch(step, 3 + step % 2)])
            steps.append((loss.numpy().tobytes(), optimizer.last.projected.tobytes(), optimizer.last.coefs.tobytes(), optimizer.last.clipped))
        outcomes.append((steps, target.w.numpy().tobytes(), optimizer.clip.recent()))
    assert outcomes[0] == outcomes[1] and any(clipped for *_, clipped in outcomes[0][0])
    assert (graphs.captures, graphs.replays, len(graphs.captured)) == (2, 18, 2)


def test_the_least_recently_used_graph_is_dropped(monkeypatch):
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    target, optimizer = make()
    graphs = Replayed(optimizer, loss_of(target))
    for rows in (1, 1, 2, 2, 1, 3, 3):
        graphs.step([make_batch(0, rows)])
    assert (graphs.captures, len(graphs.captured)) == (3, 2)
    graphs.step([make_batch(0, 1)])
    assert graphs.captures == 3, "kept: it was used after the other"
    graphs.step([make_batch(0, 2)])
    assert (graphs.captures, graphs.replays) == (3, 5), "dropped: its next step warms up again"
    graphs.step([make_batch(0, 2)])
    assert (graphs.captures, len(graphs.captured)) == (4, 2)


def test_a_cpu_captures_nothing():
    target, optimizer = make()
    graphs = Graphs(optimizer, loss_of(target))
    for _ in range(3):
        graphs.step([make_batch(0)])
    assert not graphs.capture and len(graphs.captured) == 0 and optimizer.steps == 3


def test_micro_batches_are_told_apart_by_all_their_shapes():
    target, optimizer = make()
    graphs = Replayed(optimizer, loss_of(target))
    for rows in ((2, 3), (3, 2), (2, 3, 1), (2, 3), (3, 2)):
        graphs.step([make_batch(i, n) for i, n in enumerate(rows)])
    assert (graphs.captures, graphs.replays) == (2, 2)


def test_a_measured_step_keeps_its_numbers():
    """It is read after later steps have begun."""
    target, optimizer = make()
    closure = lambda: loss_of(target)([make_batch(0)], 1)  # noqa: E731
    losses, pending = [], []
    for _ in range(4):
        losses.append(optimizer.step(closure))
        pending.append(optimizer.newest)
    records = [measured.read() for measured in pending]
    assert [r.step for r in records] == [0, 1, 2, 3]
    assert [r.loss for r in records] == [loss.item() for loss in losses] and len({r.loss for r in records}) == 4
    assert records[-1].coefs.tobytes() == optimizer.last.coefs.tobytes() and pending[0].read().loss == records[0].loss


def test_the_rate_of_a_step_is_that_of_its_launch():
    target, optimizer = make(directions=1, clip=Clip())
    closure = lambda: loss_of(target)([make_batch(0)], 1)  # noqa: E731
    for rate in (0.5, 0.25, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(closure)
        assert optimizer.last.coefs[0, 0] == np.float32(rate) * optimizer.last.projected[0]
    assert ZO([Toy()]).last is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not permitted")], ids=["memory", "other"])
def test_a_capture_that_fails_says_why_and_moves_nothing(error, monkeypatch):
    @contextmanager
    def capture(graph, pool):
        try:
            yield
        finally:
            raise RuntimeError("the capture is invalid")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    target, optimizer = make()
    graphs = Graphs(optimizer, loss_of(target))
    graphs.capture = True
    graphs.step([make_batch(0)])
    before = target.w.numpy().tobytes()

    def failing(batches, variants):
        raise error

    graphs.loss = failing
    with pytest.raises(type(error), match=str(error) if isinstance(error, torch.OutOfMemoryError) else "invalid"):
        graphs.step([make_batch(0)])
    assert optimizer.steps == 1 and not graphs.captured and target.w.numpy().tobytes() == before
