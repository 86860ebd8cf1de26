"""Whole steps as CUDA graphs: one launch by the host for all forwards of a step, its estimate and its update."""

import dataclasses
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qzo.zo.optimizer import ZO

MAX_GRAPHS = 16


@dataclasses.dataclass
class Captured:
    """A step on the batches of one shape: replaying `graph` runs it on what `batches` hold then."""

    graph: torch.cuda.CUDAGraph
    batches: list[Any]


class Graphs:
    """Steps of `optimizer` on batches, the same operations in one of two ways: launched one by one, or as a captured graph.

        graphs = Graphs(optimizer, lambda batches, variants: per_example_loss(model, batches[0], variants).mean(1))
        graphs.step([batch])              # the first step of these shapes runs eagerly: it warms up what a capture needs
        loss = graphs.step([batch])       # the second is captured, and this and later ones are replayed
        optimizer.last                    # waits for the step, and reads what it measured

    `loss(batches, variants)` gives fp32 [variants], and reads of the batches, which are dataclasses, tensors alone, on the
    optimizer's device. The shapes of all tensors make the key of a graph; the least recently used of more than
    `MAX_GRAPHS` is dropped. One pool of memory serves all graphs. `capture=False`, and a CPU, leave every step eager.
    `rest()` brings what the host keeps track of for the loss to the one state in which every captured step begins and ends.
    """

    def __init__(
        self, optimizer: ZO, loss: Callable[[Sequence[Any], int], Tensor], capture: bool = True,
        rest: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.optimizer, self.loss, self.rest = optimizer, loss, rest
        self.capture = capture and optimizer.device.type == "cuda"
        self.captured: OrderedDict[tuple, Captured] = OrderedDict()
        self._seen: set[tuple] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None

    def step(self, batches: Sequence[Any]) -> Tensor:
        """One step; returns its mean loss, fp32 scalar on the device, without waiting for it."""
        return self.optimizer.around(lambda: self._work(batches))

    def _work(self, batches: Sequence[Any]) -> None:
        key = tuple(tuple(t.shape) for t in _tensors(batches))
        if not self.capture or key not in self._seen:
            self._seen.add(key)
            return self._eager(batches)
        self.rest()
        if found := self.captured.get(key):
            for static, given in zip(_tensors(found.batches), _tensors(batches), strict=True):
                static.copy_(given, non_blocking=True)
        else:
            found = self.captured[key] = self._capture(batches)
        self.captured.move_to_end(key)
        found.graph.replay()
        if len(self.captured) > MAX_GRAPHS:
            oldest, dropped = self.captured.popitem(last=False)
            dropped.graph.reset()
            self._seen.discard(oldest)

    def _eager(self, batches: Sequence[Any]) -> None:
        self.optimizer.work(lambda variants=1: self.loss(batches, variants))

    def _capture(self, batches: Sequence[Any]) -> Captured:
        """Records a step, which does not run it."""
        static = [dataclasses.replace(b, **{name: t.clone() for name, t in _fields(b)}) for b in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            with _without_collector(), torch.cuda.graph(graph, pool=self._pool):
                self._eager(static)
                self.rest()
        except RuntimeError as error:
            # The end of a capture that ran out of memory fails too, and would hide why.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        return Captured(graph, static)


@contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage of an earlier run stays until later: freeing page-locked memory waits for the device, which ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _fields(batch: Any) -> list[tuple[str, Tensor]]:
    values = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return [(name, value) for name, value in values if isinstance(value, Tensor)]


def _tensors(batches: Sequence[Any]) -> list[Tensor]:
    return [tensor for batch in batches for _, tensor in _fields(batch)]
