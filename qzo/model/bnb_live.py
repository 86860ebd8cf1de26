"""Linears that bitsandbytes holds in memory, as QuantLinears: the codes in our order in the storage of theirs, nothing kept twice.

For `qzo.prepare` on a model that transformers loaded in NF4, FP4 or LLM.int8. What comes out computes in the dtype of its input,
without the rounding of activations of LLM.int8, and is saved (state_dict, save_pretrained) as bitsandbytes saves its own.
Row n of the packed codes has as many bytes in both orders where K is a multiple of 128; else the codes move to new memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from qzo_kernels.pack import tiled_words, untile_codes
from torch import Tensor, nn

from qzo.errors import BadInput
from qzo.model.bnb4_format import unpack
from qzo.model.bnb8_format import flipped, scales_of, scb_of
from qzo.model.linear import QuantLinear, Scratch
from qzo.model.uniform import LayerTensors, fill_codes


class LiveLinear(QuantLinear):
    """A QuantLinear that is saved as what it was: `theirs()` gives its tensors by name, but for the bias."""

    theirs: Callable[[], dict[str, Tensor]]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        kept = {"bias": self.bias.detach()} if self.bias is not None else {}
        destination.update({prefix + name: tensor for name, tensor in (self.theirs() | kept).items()})


def _words(packed: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """int32 [rows, words] for our order of the codes: the bytes of `packed` themselves, where they are as many."""
    words = tiled_words(cols, bits)
    if 4 * words * rows == packed.numel() and packed.is_contiguous() and packed.data_ptr() % 16 == 0:
        return packed.view(rows, 4 * words).view(torch.int32)
    return torch.empty(rows, words, dtype=torch.int32, device=packed.device)


def from_4bit(name: str, module: Any, scratch: Scratch) -> QuantLinear:
    """Of a bitsandbytes Linear4bit. Raises BadInput for one that is not quantized yet, or whose blocks cross rows."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise BadInput(f"prepare, {name}", "a Linear4bit whose weight is not quantized", "one that is", "Move the model to its device first.")
    if getattr(state, "packing_format_for_cpu", False):
        raise BadInput(f"prepare, {name}", "weights that a forward on the CPU has rewritten", "a model that has not run yet",
                       "Call qzo.prepare right after from_pretrained.")  # fmt: skip
    rows, cols = state.shape
    if cols % state.blocksize:
        raise BadInput(f"prepare, {name}", f"blocksize {state.blocksize} with rows of {cols}: blocks that cross rows", "a blocksize that divides each row")
    scales = _absmax(state).view(rows, -1)
    packed = module.weight.data.view(-1).view(torch.uint8).view(rows, cols // 2)
    codes, kind = _words(packed, rows, cols, 4), module.weight.data.dtype
    fill_codes(codes, 4, lambda start, end: unpack(packed[start:end]), None)
    layer = LiveLinear(name, LayerTensors(codes, scales, None, None, state.code.float().contiguous()), 4, state.blocksize, cols, _bias(module), scratch)

    def theirs() -> dict[str, Tensor]:
        from bitsandbytes.functional import QuantState

        q = untile_codes(layer.codes, 4, cols).to(torch.uint8)
        plain = QuantState(layer.scales.detach().flatten(), state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
        parts = {f"weight.{key}": value for key, value in plain.as_dict(packed=True).items()}
        return {"weight": (q[:, ::2] << 4 | q[:, 1::2]).view(-1, 1).view(kind)} | parts

    layer.theirs = theirs
    return layer


def _absmax(state: Any) -> Tensor:
    """fp32, double quantization undone."""
    if not state.nested:
        return state.absmax.float().contiguous()
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def from_8bit(name: str, module: Any, scratch: Scratch) -> QuantLinear:
    """Of a bitsandbytes Linear8bitLt. Raises BadInput for one that is not quantized yet."""
    weight = module.weight
    scb = getattr(weight, "SCB", None)
    if weight.dtype != torch.int8 or scb is None:
        raise BadInput(f"prepare, {name}", f"a Linear8bitLt whose weight is {weight.dtype}", "int8", "Move the model to its device first.")
    rows, cols = weight.shape
    scales = scales_of(scb)[:, None].contiguous()
    packed = weight.data.view(torch.uint8)
    codes = _words(packed, rows, cols, 8)
    fill_codes(codes, 8, lambda start, end: flipped(packed[start:end]), None)
    layer = LiveLinear(name, LayerTensors(codes, scales, None, None), 8, cols, cols, _bias(module), scratch)

    def theirs() -> dict[str, Tensor]:
        q = untile_codes(layer.codes, 8, cols).to(torch.uint8)
        return {"weight": flipped(q).view(torch.int8), "SCB": scb_of(layer.scales.detach(), scb), "weight_format": torch.tensor(0, dtype=torch.uint8)}

    layer.theirs = theirs
    return layer


def _bias(module: nn.Module) -> Tensor | None:
    return None if module.bias is None else module.bias.data
