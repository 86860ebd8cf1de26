"""Codes of the decoder layers in host memory, brought to the device layer by layer while the layer before computes.

Two buffers on the device, each as large as the largest layer's codes; one copy per layer, none back. What orders the copies:

    compute  ... use of layer i-1 | passed | wait(arrived i) | use of layer i ...        | wait(arrived i+1) | use of layer i+1
    side                              wait(passed) | copy of layer i+1 over layer i-1 | arrived i+1

  - A layer is used after its copy: its first use waits for the event that the copy leaves behind.
  - A buffer is overwritten after its last use: only the buffer that is not in use is filled, what used it was launched on
    the compute stream before, and the copy waits for an event recorded there now. A caller that changes streams orders them,
    as for every tensor.
  - Copies follow each other on one side stream, so that of two into one buffer the later one stays.
"""

import mmap
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import RunFailed
from qzo.model.linear import QuantLinear

# Each Linear's codes begin where the device's allocator would let them begin: kernels see the same alignment.
_ALIGNMENT = 128  # words of 4 bytes


class Lanes:
    """The queues of a GPU: the current stream, which computes, and a side stream of copies from the host."""

    def __init__(self, device: torch.device):
        self.device, self.side = device, torch.cuda.Stream(device)

    def capturing(self) -> bool:
        """Whether operations are recorded in a graph rather than run."""
        return torch.cuda.is_current_stream_capturing()

    def passed(self) -> Any:
        """An event: what was launched on the compute stream before now is done."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        """What is launched on the compute stream from now on comes after `event`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def fetch(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy page-locked `source` to `target` on the side stream after `after`; returns the event of its end."""
        with torch.cuda.stream(self.side):
            self.side.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy between the buffers on the compute stream."""
        target.copy_(source)


class CodeStream:
    """The codes of `layers`, a list of QuantLinears per decoder layer, in host memory; two layers' codes on `device`.

        stream = CodeStream(layers, device)     # from now on the forward of these QuantLinears asks it for their codes
        stream.rest()                           # before a capture, at its end, and before every replay

    A QuantLinear's `codes` become its part of the layer's block in host memory, page-locked for a GPU. Layers may be used
    in any order; in the order 0 … L − 1, 0 … each is there before it is needed. `rest` brings the buffers to one known
    state, which a captured graph finds and leaves; without it a capture, or a replay after other forwards, is an error.
    `bytes_per_forward` cross the bus in a forward: a step of F forwards (micro-batches, signs one by one) takes F times that.
    RunFailed where the host's memory cannot be page-locked.
    """

    def __init__(self, layers: Sequence[Sequence[QuantLinear]], device: torch.device, lanes: Lanes | None = None):
        self.lanes, layers = lanes or Lanes(device), [layer for layer in layers if layer]
        self._blocks = [_block(layer, device) for layer in layers]
        sizes = [len(block) for block in self._blocks]
        self.bytes_per_forward = 4 * sum(sizes)
        self._buffers = [torch.empty(max(sizes), dtype=torch.int32, device=device) for _ in range(2)]
        self.device_bytes = 4 * sum(map(len, self._buffers))
        self._views: list[list[list[Tensor]]] = []  # by layer, buffer and place in the layer
        for index, layer in enumerate(layers):
            self._views.append([_parts(buffer, layer) for buffer in self._buffers])
            for place, (linear, codes) in enumerate(zip(layer, _parts(self._blocks[index], layer), strict=True)):
                linear.codes, linear.source = codes, partial(self.codes, index, place)
        self._held: list[int | None] = [None, None]  # the layer in each buffer, or on its way there
        self._arriving: list[Any] = [None, None]  # the event of a copy that nobody has waited for yet
        self._used: int | None = None  # the buffer whose layer was used last; None at rest
        self._captured = False
        if device.type == "cuda":
            for buffer in self._buffers:
                buffer.record_stream(self.lanes.side)
            weakref.finalize(self, _unlock, self._blocks, device).atexit = False

    def codes(self, index: int, place: int) -> Tensor:
        """The codes of a Linear on the device, for operations that are launched before another layer's codes are asked for."""
        self._same_queue()
        if self._used is None or self._held[self._used] != index:
            self._enter(index)
        return self._views[index][self._used][place]

    def _enter(self, index: int) -> None:
        """Layer `index` is used from now on, and the next one fetched."""
        used = self._used or 0
        if index not in self._held:
            self._fetch(index, 1 - used)
        self._used = self._held.index(index)
        self._join(self._used)
        following = (index + 1) % len(self._blocks)
        if following not in self._held:
            self._fetch(following, 1 - self._used)

    def _fetch(self, index: int, buffer: int) -> None:
        block = self._blocks[index]
        self._arriving[buffer] = self.lanes.fetch(self._buffers[buffer][: len(block)], block, self.lanes.passed())
        self._held[buffer] = index

    def _join(self, buffer: int) -> None:
        if self._arriving[buffer] is not None:
            self.lanes.wait(self._arriving[buffer])
            self._arriving[buffer] = None

    def rest(self) -> None:
        """Layer 0 in the first buffer, nothing else held, and no copy under way that the compute stream will not have waited for."""
        self._same_queue()
        if self._used is None and self._held == [0, None]:
            return
        if 0 not in self._held:
            self._fetch(0, 1 - (self._used or 0))
        for buffer in range(2):
            self._join(buffer)
        if self._held[0] != 0:
            size = len(self._blocks[0])
            self.lanes.move(self._buffers[0][:size], self._buffers[1][:size])
        self._held, self._used = [0, None], None

    def _same_queue(self) -> None:
        """A graph and the operations around it share nothing but the state at rest."""
        captured = self.lanes.capturing()
        if captured != self._captured:
            at_rest = self._used is None and self._held == [0, None]
            if captured and not at_rest:
                raise RuntimeError("codes in host memory: captured while a layer is on its way; call rest(), then capture")
            if not at_rest:
                # The capture failed: none of what it recorded has run.
                self._held, self._arriving, self._used = [None, None], [None, None], None
            self._captured = captured


def stream_codes(model: nn.Module, device: torch.device) -> CodeStream | None:
    """From now on the codes in the decoder layers of a transformers model come from host memory; None where there are none."""
    found = [[m for m in layer.modules() if isinstance(m, QuantLinear)] for layer in model.get_decoder().layers]
    return CodeStream(found, device) if any(found) else None


def _starts(layer: Sequence[QuantLinear]) -> list[int]:
    """Where each Linear's codes begin in the layer's block, in words; last, where the block ends."""
    starts = [0]
    for linear in layer:
        starts.append(starts[-1] + -(-linear.codes.numel() // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _parts(block: Tensor, layer: Sequence[QuantLinear]) -> list[Tensor]:
    """Views [N, words] of a layer's block, one per Linear."""
    return [block[start:][: one.codes.numel()].view(one.codes.shape) for start, one in zip(_starts(layer), layer, strict=False)]


def _block(layer: Sequence[QuantLinear], device: torch.device) -> Tensor:
    """The layer's codes in one stretch of host memory; the Linears' own are given up, so that one layer at a time is there twice."""
    # Pages of its own, and locked here: what torch pins is rounded up to a power of two.
    size = 4 * _starts(layer)[-1]
    block = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.int32)
    for linear, part in zip(layer, _parts(block, layer), strict=True):
        part.copy_(linear.codes)
        linear.codes = part
    if device.type == "cuda" and (code := int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0))):
        raise RunFailed("offload", f"{size} bytes of host memory that cannot be page-locked (CUDA error {code})", "memory that can be",
                        "Free host memory, or use offload=none.")  # fmt: skip
    return block


def _unlock(blocks: Sequence[Tensor], device: torch.device) -> None:
    torch.cuda.synchronize(device)
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
