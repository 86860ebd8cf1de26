"""A model that the user holds in, its QuantLinears by name out: what moves when it is tuned."""

from collections.abc import Callable

import torch
from torch import nn

from qzo.errors import BadInput
from qzo.model.bnb_live import from_4bit, from_8bit
from qzo.model.formats import FORMATS
from qzo.model.linear import QuantLinear, Scratch

# Quantized Linears of other libraries, as package.Class: (name, module, scratch) -> a QuantLinear that computes what the module computes.
CONVERT: dict[str, Callable[[str, nn.Module, Scratch], QuantLinear]] = {"bitsandbytes.Linear4bit": from_4bit, "bitsandbytes.Linear8bitLt": from_8bit}


def prepare(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of `model` by module name, for `qzo.Scales`; the model is changed in place to be tuned.

    A model of `qzo.load_model(...)`, or of `from_pretrained` after `import qzo`, has QuantLinears already. Linears of bitsandbytes are
    replaced (bnb_live.py), their codes in the same storage. The model is then in eval mode (dropout would differ between the two
    forwards of a step), without gradients and without a cache. To be called once the model is on its device.
    Raises BadInput for a 16-bit model, for other quantized layers, and for scales that a cast has left in half precision.
    """
    if not isinstance(model, nn.Module):
        raise BadInput("prepare", type(model).__name__, "a torch.nn.Module", "Of qzo.load_model(...), give its .model.")
    scratch = Scratch()
    for name, module in list(model.named_modules()):
        if convert := CONVERT.get(_kind(module)):
            model.set_submodule(name, convert(name, module, scratch))
            model.is_quantized = False  # for transformers: its Trainer refuses, and looks for layers that are gone
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise _unprepared(model)
    for name, layer in layers.items():
        if layer.scales.dtype != torch.float32:
            raise BadInput(f"prepare, {name}.scales", str(layer.scales.dtype), "torch.float32, below which small updates are lost",
                           "Load the model in the dtype to compute in instead of casting it.")  # fmt: skip
    model.eval().requires_grad_(False)
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
    return layers


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"


def _unprepared(model: nn.Module) -> BadInput:
    linears = [module for module in model.modules() if hasattr(module, "in_features")]
    kinds = sorted({_kind(module) for module in linears if type(module) is not nn.Linear})
    if not kinds and getattr(model, "is_quantized", False):  # by transformers, which hides it in plain Linears
        kinds = [str(getattr(model.quantization_method, "value", model.quantization_method))]
    known = ", ".join([*FORMATS, *CONVERT])
    if kinds:
        return BadInput("prepare", f"quantized layers of another library ({', '.join(kinds)})", f"layers of {known}",
                        "Load the checkpoint with qzo.load_model(FOLDER).model.")  # fmt: skip
    return BadInput("prepare", f"a model with {len(linears)} Linears, none of them quantized", f"layers of {known}",
                    "Quantize it first: qzo quantize MODEL -o OUT, then qzo.load_model(OUT).model.")  # fmt: skip
