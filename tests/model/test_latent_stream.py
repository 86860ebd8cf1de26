"""Latents in host memory: every use sees all updates before it, in whatever order a GPU runs its queues, and runs have the same bits."""

from types import SimpleNamespace

import pytest
import torch
from tiny_lanes import Queues
from torch import nn

from qzo.model.latent_stream import LatentStream

CPU = torch.device("cpu")


class Linear(SimpleNamespace):
    """What a stream needs of a FakeQuantLinear."""

    def hold(self, weight):
        self.weight = weight


class Driver:
    """Layers of one or two weights, their stream, and what their values must be: moved by the same numbers, on the compute queue."""

    def __init__(self, count, seed=0, **broken):
        self.layers = [[Linear(weight=nn.Parameter(torch.full((2, 3 + 70 * (i % 3) + j), 1000.0 * i + 100 * j), requires_grad=False))
                        for j in range(1 + i % 2)] for i in range(count)]  # fmt: skip
        self.expected = [[linear.weight.data.clone() for linear in layer] for layer in self.layers]
        self.queues = Queues(seed, **broken)
        self.stream = LatentStream(self.layers, CPU, self.queues)
        self.given, self.changes = torch.ones(1, 1), 0

    def forward(self, order=None):
        for i in range(len(self.layers)) if order is None else order:
            for linear, right in zip(self.layers[i], self.expected[i], strict=True):
                self.queues.use(linear.source(), right)

    def change(self, linear, weight, state, coefs):
        self.changes += 1
        self.queues.change(weight, coefs)

    def update(self):
        """By what `given` holds when the queue comes to it."""
        self.stream.update(self.change, torch.zeros(2, dtype=torch.int64), self.given)
        for right in sum(self.expected, []):
            self.queues.add(right, self.given)

    def next_number(self):
        """`given` becomes another number, on the queue."""
        self.queues.move(self.given, torch.full((1, 1), float(self.queues.rng.randrange(1, 50))))

    def step(self, forwards=2):
        for _ in range(forwards):
            self.forward()
        self.update()

    def in_host_memory(self):
        """Whether, settled, the host's weights are right; then they are written."""
        self.stream.settle()
        right = all(torch.equal(a.weight, b) for layer, expected in zip(self.layers, self.expected, strict=True) for a, b in zip(layer, expected, strict=True))
        for tensor in (t for layer, expected in zip(self.layers, self.expected, strict=True) for a, b in zip(layer, expected, strict=True) for t in (a.weight.data, b)):
            tensor.add_(7)
        return right

    def wander(self):
        """One of what a run does between steps, or none."""
        pick, count = self.queues.rng.randrange(8), len(self.layers)
        if pick == 0:
            self.stream.rest()
        elif pick == 1:
            self.forward([self.queues.rng.randrange(count) for _ in range(5)])
        elif pick == 2:
            self.queues.wrong += not self.in_host_memory()
        elif pick == 3:
            self.queues.run()
        elif pick == 4:
            self.next_number()
            self.update()

    def finished(self):
        self.stream.settle()
        self.queues.run()
        return self.queues.wrong == 0 and self.in_host_memory()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_use_sees_all_updates_before_it(count):
    for seed in range(30):
        driver = Driver(count, seed)
        for _ in range(6):
            driver.next_number()
            driver.step(driver.queues.rng.randrange(3))
            driver.wander()
        assert driver.finished()


@pytest.mark.parametrize("queue", ["compute", "side", "back"])
def test_without_the_waits_of_a_queue_wrong_weights_are_seen(queue):
    wrong = 0
    for seed in range(10):
        driver = Driver(5, seed, **{queue: True})
        for _ in range(3):
            driver.step()
        driver.queues.run()
        wrong += driver.queues.wrong
    assert wrong


def test_an_update_is_done_once_and_late():
    driver = Driver(4)
    linears = sum(map(len, driver.layers))
    driver.step()
    assert driver.changes == 0 and not driver.queues.queues["back"]
    driver.forward([0, 1])
    assert driver.changes == 3, "the weights of the layers that were used"
    driver.forward()
    driver.forward()
    assert driver.changes == linears
    stored = [op for op in driver.queues.queues["back"] if op[0] == "end"]
    assert len(stored) == len(driver.layers) and driver.finished()


def test_a_step_takes_each_layer_in_once_per_forward_and_back_once():
    driver = Driver(5)
    driver.step(1)
    fetched = len(driver.queues.copies)
    driver.queues.run()
    driver.step(3)
    assert len(driver.queues.copies) - fetched == 3 * 5
    assert len([op for op in driver.queues.queues["back"] if op[0] == "end"]) == 5
    assert driver.stream.bytes_per_forward == 4 * sum(map(len, driver.stream._blocks))


def replayed(count, forwards, seed, rests=True):
    """Wrong sights in a run of captured steps with other work between them."""
    driver = Driver(count, seed)
    driver.step(forwards)
    driver.stream.rest()

    def work():
        driver.step(forwards)
        driver.stream.rest()

    graph = driver.queues.capture(work)
    for _ in range(5):
        driver.next_number()
        driver.wander()
        if rests:
            driver.stream.rest()
        driver.queues.replay(graph)
        if driver.queues.rng.random() < 0.3:
            driver.queues.run()
    right = driver.finished()
    return driver.queues.wrong + (not right)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("forwards", [1, 2])
def test_captured_steps_and_what_runs_between_them(count, forwards):
    assert sum(replayed(count, forwards, seed) for seed in range(15)) == 0


def test_replays_that_do_not_begin_at_rest_see_wrong_weights():
    assert sum(replayed(5, 1, seed, rests=False) for seed in range(10))


def test_a_capture_begins_at_rest_after_a_step_and_one_that_failed_is_forgotten():
    driver = Driver(5)
    with pytest.raises(RuntimeError, match="do a step before it"):
        driver.stream.rest()
        driver.queues.capture(driver.update)
    driver.step()
    driver.forward([0])
    with pytest.raises(RuntimeError, match=r"call rest\(\), then capture"):
        driver.queues.capture(driver.step)
    driver.update()
    driver.stream.rest()
    before = driver.changes
    with pytest.raises(AssertionError, match="not joined"):
        driver.queues.capture(lambda: driver.forward([0, 1, 2]))
    driver.changes = before
    driver.forward()
    assert driver.changes == before + sum(map(len, driver.layers)), "what was due before the capture is due after it"
    assert driver.finished()
