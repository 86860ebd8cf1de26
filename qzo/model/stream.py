"""Tensors of the decoder layers in host memory, brought to the device layer by layer while the layer before computes.

Two buffers on the device, each as large as the largest layer's tensors. What orders the copies:

    compute  ... use of layer i-1 | passed | wait(arrived i) | use of layer i ...        | wait(arrived i+1) | use of layer i+1
    side                              wait(passed) | copy of layer i+1 over layer i-1 | arrived i+1

  - A layer is used after its copy: its first use waits for the event that the copy leaves behind.
  - A buffer is overwritten after its last use: only the buffer that is not in use is filled, what used it was launched on
    the compute stream before, and the copy waits for an event recorded there now. A caller that changes streams orders them,
    as for every tensor.
  - Copies follow each other on one side stream, so that of two into one buffer the later one stays.

Codes (CodeStream, here) are only read; latents (model/latent_stream.py) also return, changed.
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

# Each Linear's tensor begins where the device's allocator would let it begin: kernels see the same alignment.
_ALIGNMENT = 128  # words of 4 bytes


class Lanes:
    """The queues of a GPU: the current stream, which computes, a side stream of copies from the host, and one of copies back."""

    def __init__(self, device: torch.device):
        self.device, self.side, self.back = device, torch.cuda.Stream(device), torch.cuda.Stream(device)

    def capturing(self) -> bool:
        """Whether operations are recorded in a graph rather than run."""
        return torch.cuda.is_current_stream_capturing()

    def passed(self) -> Any:
        """An event: what was launched on the compute stream before now is done."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        """What is launched on the compute stream from now on comes after `event`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def fetch(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        """Copy page-locked `source` to `target` on the side stream after these events; returns the event of its end."""
        return _copied(self.side, target, source, after)

    def store(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy `source` to page-locked `target` on the stream back after `after`; returns the event of its end."""
        return _copied(self.back, target, source, [after])

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy from one place of the device to another on the compute stream."""
        target.copy_(source)

    def finish(self) -> None:
        """Wait, on the host, for what was launched on the compute stream."""
        torch.cuda.current_stream(self.device).synchronize()


def _copied(stream: torch.cuda.Stream, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
    with torch.cuda.stream(stream):
        for event in after:
            stream.wait_event(event)
        target.copy_(source, non_blocking=True)
        return stream.record_event()


class LayerStream:
    """One tensor of 4-byte numbers of each of `layers`, a list of Linears per decoder layer, in host memory; two layers' on `device`.

    A Linear's tensor becomes its part of the layer's block in host memory, page-locked for a GPU, and its `source` gives it on the
    device. Layers may be used in any order; in the order 0 … L − 1, 0 … each is there before it is needed. `rest` brings the buffers
    to one known state, which a captured graph finds and leaves; without it a capture, or a replay after other forwards, is an error.
    `bytes_per_forward` cross the bus in a forward: a step of F forwards (micro-batches, signs one by one) takes F times that.
    RunFailed where the host's memory cannot be page-locked.
    """

    kind, dtype = "", torch.int32  # of the tensors, as an error names them

    def __init__(self, layers: Sequence[Sequence[nn.Module]], device: torch.device, lanes: Lanes | None = None):
        self.lanes, self.layers = lanes or Lanes(device), [layer for layer in layers if layer]
        self._blocks = [self._block(layer, device) for layer in self.layers]
        sizes = [len(block) for block in self._blocks]
        self.bytes_per_forward = 4 * sum(sizes)
        self._buffers = [torch.empty(max(sizes), dtype=self.dtype, device=device) for _ in range(2)]
        self.device_bytes = 4 * sum(map(len, self._buffers))
        self._views: list[list[list[Tensor]]] = []  # by layer, buffer and place in the layer
        for index, layer in enumerate(self.layers):
            self._views.append([self._parts(buffer, layer) for buffer in self._buffers])
            for place, linear in enumerate(layer):
                linear.source = partial(self.part, index, place)
        self._held: list[int | None] = [None, None]  # the layer in each buffer, or on its way there
        self._arriving: list[Any] = [None, None]  # the event of a copy that nobody has waited for yet
        self._used: int | None = None  # the buffer whose layer was used last; None at rest
        self._captured = False
        if device.type == "cuda":
            for buffer in self._buffers:
                buffer.record_stream(self.lanes.side)
                buffer.record_stream(self.lanes.back)
            weakref.finalize(self, _unlock, self._blocks, device).atexit = False

    @staticmethod
    def given(linear: nn.Module) -> Tensor:
        """The tensor of a Linear."""
        raise NotImplementedError

    @staticmethod
    def keep(linear: nn.Module, part: Tensor) -> None:
        """Put `part`, of host memory, in its place."""
        raise NotImplementedError

    def part(self, index: int, place: int) -> Tensor:
        """The tensor of a Linear on the device, for operations that are launched before another layer's is asked for."""
        self._same_queue()
        if not self._ready(index):
            self._enter(index)
        return self._views[index][self._used][place]

    def _ready(self, index: int) -> bool:
        return self._used is not None and self._held[self._used] == index

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
        self._arriving[buffer] = self.lanes.fetch(self._buffers[buffer][: len(block)], block, self._free(buffer))
        self._held[buffer] = index

    def _free(self, buffer: int) -> list[Any]:
        """The events after which a buffer that is not in use may be overwritten."""
        return [self.lanes.passed()]

    def _join(self, buffer: int) -> None:
        if self._arriving[buffer] is not None:
            self.lanes.wait(self._arriving[buffer])
            self._arriving[buffer] = None

    def rest(self) -> None:
        """Layer 0 in the first buffer, nothing else held, and no copy under way that the compute stream will not have waited for."""
        self._same_queue()
        if self._at_rest():
            return
        if 0 not in self._held:
            self._fetch(0, 1 - (self._used or 0))
        for buffer in range(2):
            self._join(buffer)
        if self._held[0] != 0:
            size = len(self._blocks[0])
            self.lanes.move(self._buffers[0][:size], self._buffers[1][:size])
        self._held, self._used = [0, None], None

    def _at_rest(self) -> bool:
        return self._used is None and self._held == [0, None]

    def _same_queue(self) -> None:
        """A graph and the operations around it share nothing but the state at rest."""
        captured = self.lanes.capturing()
        if captured != self._captured:
            at_rest = self._at_rest()
            if captured and not at_rest:
                raise RuntimeError(f"{self.kind} in host memory: captured while a layer is on its way; call rest(), then capture")
            if not at_rest:
                # The capture failed: none of what it recorded has run.
                self._forget()
            self._captured = captured

    def _forget(self) -> None:
        """The buffers hold nothing."""
        self._held, self._arriving, self._used = [None, None], [None, None], None

    def _starts(self, layer: Sequence[nn.Module]) -> list[int]:
        """Where each Linear's tensor begins in the layer's block, in words; last, where the block ends."""
        starts = [0]
        for linear in layer:
            starts.append(starts[-1] + -(-self.given(linear).numel() // _ALIGNMENT) * _ALIGNMENT)
        return starts

    def _parts(self, block: Tensor, layer: Sequence[nn.Module]) -> list[Tensor]:
        """Views of a layer's block, one per Linear."""
        given = [self.given(linear) for linear in layer]
        return [block[start:][: one.numel()].view(one.shape) for start, one in zip(self._starts(layer), given, strict=False)]

    def _block(self, layer: Sequence[nn.Module], device: torch.device) -> Tensor:
        """The layer's tensors in one stretch of host memory; the Linears' own are given up, so that one layer at a time is there twice."""
        # Pages of its own, and locked here: what torch pins is rounded up to a power of two.
        size = 4 * self._starts(layer)[-1]
        block = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=self.dtype)
        for linear, part in zip(layer, self._parts(block, layer), strict=True):
            part.copy_(self.given(linear))
            self.keep(linear, part)
        if device.type == "cuda" and (code := int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0))):
            raise RunFailed("offload", f"{size} bytes of host memory that cannot be page-locked (CUDA error {code})", "memory that can be",
                            "Free host memory, or use offload=none.")  # fmt: skip
        return block


class CodeStream(LayerStream):
    """The codes of QuantLinears; never written.

        stream = CodeStream(layers, device)     # from now on the forward of these QuantLinears asks it for their codes
        stream.rest()                           # before a capture, at its end, and before every replay
    """

    kind = "codes"

    @staticmethod
    def given(linear: QuantLinear) -> Tensor:
        return linear.codes

    @staticmethod
    def keep(linear: QuantLinear, part: Tensor) -> None:
        linear.codes = part


def stream_codes(model: nn.Module, device: torch.device) -> CodeStream | None:
    """From now on the codes in the decoder layers of a transformers model come from host memory; None where there are none."""
    found = [[m for m in layer.modules() if isinstance(m, QuantLinear)] for layer in model.get_decoder().layers]
    return CodeStream(found, device) if any(found) else None


def _unlock(blocks: Sequence[Tensor], device: torch.device) -> None:
    torch.cuda.synchronize(device)
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
