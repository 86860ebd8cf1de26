"""The layers of a latent checkpoint (model/zeroqat_format.py) in memory: FakeQuantLinears, their quantizer as the folder has it."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.linear import QuantLinear, Scratch
from qzo.model.load import fill
from qzo.model.packing import quant_linear
from qzo.model.qat import FakeQuantLinear, load_quantizer_state, prepare_layer, quantize_operands, quantizer_state
from qzo.model.zeroqat_format import LatentConfig
from qzo.progress import Progress

_POSITIVE = ("scale", "span", "factor")
_LOGITS = ("low", "high")  # of which infinity is one


def load_latent(
    model: nn.Module, folder: Folder, config: LatentConfig, device: torch.device, dtype: torch.dtype, keep: Collection[str] | None = None,
    host: bool = False,
) -> tuple[dict[str, FakeQuantLinear], dict[str, QuantLinear]]:  # fmt: skip
    """Fill the decoder layers of a model on meta and prepare them: (the FakeQuantLinears, the packed ones) by name.

    keep: last names of Linears; all others are packed as soon as their layer is read, so that one layer's latents are in memory. host: the weights of
    those that are kept stay on the CPU.
    Weights and biases of Linears keep the folder's dtype, so that the grid is the same for every `dtype` of forwards. Raises BadInput
    for tensors that are missing, misshapen or of values that no quantizer has, and for names that no Linear has.
    """
    fakes, packed, scratch = {}, {}, Scratch()
    quantize_operands(model)
    with Progress("load", len(model.get_decoder().layers), after=2.0) as progress:
        done = 0
        # Not by enumerate, which holds what it gave last: a layer's latents, while the next one is read.
        for _, found in prepared_layers(model, folder, config, device, dtype):
            known = {inner.rpartition(".")[2] for inner in found}
            if keep is not None and not set(keep) <= known:
                raise BadInput("latent_layers", ", ".join(keep), f"some of {', '.join(sorted(known))}")
            for inner, module in found.items():
                if keep is None or inner.rpartition(".")[2] in keep:
                    fakes[inner] = module
                    if host:
                        module.hold(module.weight.data.cpu())
                else:
                    packed[inner] = quant_linear(inner, module, dtype, scratch)
                    model.set_submodule(inner, packed[inner])
            del found, module
            done += 1
            progress.update(done)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what packing took
    return fakes, packed


def prepared_layers(
    model: nn.Module, folder: Folder, config: LatentConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, dict[str, FakeQuantLinear]]]:  # fmt: skip
    """Each decoder layer of a model on meta, filled and prepared as `load_latent` does it, with its FakeQuantLinears by full name."""
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        fill(model, folder, device, dtype, f"{name}.", exact=nn.Linear)
        prepare_layer(layer, config.precision, config.smoothing)
        load_quantizer_state(layer, {key: _read(folder, f"{name}.{key}", old) for key, old in quantizer_state(layer).items()})
        for inner, module in layer.named_modules(prefix=name):
            if isinstance(module, FakeQuantLinear) and not all(bound.isfinite() for bound in module.weight.aminmax()):
                raise BadInput(f"{folder.path}, {inner}.weight", "infinities or NaN", "finite weights", "The checkpoint is damaged.")
        module = None  # or the last of them is held while the next layer is read
        yield layer, {f"{name}.{inner}": module for inner, module in layer.named_modules() if isinstance(module, FakeQuantLinear)}


def _read(folder: Folder, name: str, old: Tensor) -> Tensor:
    value, kind, where = folder.read(name), name.rpartition(".")[2], f"{folder.path}, {name}"
    if value.shape != old.shape or value.dtype != old.dtype:
        raise BadInput(where, f"{value.dtype} of shape {list(value.shape)}", f"{old.dtype} of shape {list(old.shape)}")
    fine = ~value.isnan() if kind in _LOGITS else value.isfinite()
    if not bool(fine.all()) or kind in _POSITIVE and not bool((value > 0).all()):
        raise BadInput(where, "values that no quantizer has", "finite numbers, positive for scale, span and factor", "The checkpoint is damaged.")
    return value
