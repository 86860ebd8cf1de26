"""Latents (model/qat.py) in host memory, brought to the device layer by layer, and taken back changed: see model/stream.py.

A step's update is done late: when a layer arrives for the first forward of the next step it is changed, once, before it is used, and copied
back while it is. So the latents of a step cross the bus once per forward, and once back.

    compute  ... wait(arrived i) | change of layer i | changed i | use of layer i | passed | wait(arrived i+1) | change of layer i+1 ...
    side         copy of layer i+1 over layer i-1 after passed, left i-1                     copy of layer i+2 over layer i after passed, left i
    back                                               copy of layer i to the host after changed i | left i

What keeps the weights right:

  - `due` says of each layer whether the newest update is still to be done; a layer is changed when it is entered with `due`, and in no other
    way. So every use sees a layer after all updates before it, whatever comes first: a forward, an evaluation, statistics.
  - A new update first has those that are still due done, with the numbers of the old one.
  - A buffer is overwritten, by a copy or by a change, after the copy of its layer back to the host; and what overwrote it comes before that
    layer's next copy from the host.
  - State and coefficients of the update lie at fixed places of the device. At rest an update of every layer is due, if need be one with
    coefficients of 0, which changes no bit: a captured step begins and ends like this.
  - Whoever reads or writes the weights in host memory calls `settle` before: nothing is due, nothing is under way, the buffers hold nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzo.model.qat import FakeQuantLinear
from qzo.model.stream import Lanes, LayerStream

Change = Callable[[FakeQuantLinear, Tensor, Tensor, Tensor], None]


class LatentStream(LayerStream):
    """The weights of FakeQuantLinears, as fp32 masters.

        stream = LatentStream(layers, device)       # from now on these FakeQuantLinears ask it for their weights
        stream.update(change, state, coefs)         # change(layer, weight on the device, state, coefs) of each, once, before its next use
        stream.settle()                             # `layer.weight`, in host memory, may be read, and written
        stream.rest()                               # before a capture, at its end, and before every replay
    """

    kind, dtype = "latents", torch.float32

    def __init__(self, layers: Sequence[Sequence[FakeQuantLinear]], device: torch.device, lanes: Lanes | None = None):
        super().__init__(layers, device, lanes)
        self._due = [False] * len(self.layers)
        self._leaving: list[Any] = [None, None]  # the event of a copy to the host that no stream has waited for yet
        self._change: Change | None = None
        self._state = self._coefs = self._nothing = torch.empty(0)

    @staticmethod
    def given(linear: FakeQuantLinear) -> Tensor:
        return linear.weight.data

    @staticmethod
    def keep(linear: FakeQuantLinear, part: Tensor) -> None:
        linear.hold(part)

    def update(self, change: Change, state: Tensor, coefs: Tensor) -> None:
        """From now on an update is due: state int64 [2] and coefs fp32 [S, D], on the device, are copied."""
        self._same_queue()
        self._do_what_is_due()
        if self._coefs.shape != coefs.shape:
            if self.lanes.capturing():
                raise RuntimeError("latents in host memory: the first update inside a capture; do a step before it")
            self._state, self._coefs, self._nothing = torch.empty_like(state), torch.empty_like(coefs), torch.zeros_like(coefs)
        self.lanes.move(self._state, state)
        self.lanes.move(self._coefs, coefs)
        self._change, self._due = change, [True] * len(self.layers)

    def settle(self) -> None:
        """All updates are done, and in host memory, when this returns."""
        self._same_queue()
        self._do_what_is_due()
        for buffer in range(2):
            self._join(buffer)
        self.lanes.finish()
        self._held, self._used = [None, None], None

    def rest(self) -> None:
        self._same_queue()
        if not self._all_due():
            self._do_what_is_due()
            self.lanes.move(self._coefs, self._nothing)
            self._due = [True] * len(self.layers)
        super().rest()

    def _do_what_is_due(self) -> None:
        for index, due in enumerate(self._due):
            if due:
                self._enter(index)

    def _ready(self, index: int) -> bool:
        return super()._ready(index) and not self._due[index]

    def _enter(self, index: int) -> None:
        super()._enter(index)
        if self._due[index]:
            self._due[index] = False
            for linear, weight in zip(self.layers[index], self._views[index][self._used], strict=True):
                self._change(linear, weight, self._state, self._coefs)
            block = self._blocks[index]
            self._leaving[self._used] = self.lanes.store(block, self._buffers[self._used][: len(block)], self.lanes.passed())

    def _free(self, buffer: int) -> list[Any]:
        left, self._leaving[buffer] = self._leaving[buffer], None
        return [*super()._free(buffer), *([] if left is None else [left])]

    def _join(self, buffer: int) -> None:
        super()._join(buffer)
        if self._leaving[buffer] is not None:
            self.lanes.wait(self._leaving[buffer])
            self._leaving[buffer] = None

    def _all_due(self) -> bool:
        """Or no update was ever asked for."""
        return self._change is None or all(self._due)

    def _at_rest(self) -> bool:
        return super()._at_rest() and self._all_due()

    def _forget(self) -> None:
        super()._forget()
        self._leaving, self._due = [None, None], [self._change is not None] * len(self.layers)


def stream_latents(model: nn.Module, device: torch.device) -> LatentStream:
    """From now on the weights of the FakeQuantLinears in the decoder layers of a transformers model come from host memory."""
    return LatentStream([[m for m in layer.modules() if isinstance(m, FakeQuantLinear)] for layer in model.get_decoder().layers], device)
