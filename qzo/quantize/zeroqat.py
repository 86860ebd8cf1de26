"""ZeroQAT (arXiv 2509.00031): a 16-bit model becomes a latent checkpoint (model/zeroqat_format.py), its quantizer searched layer by layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.qat import ACTIVATION_BITS
from qzo.model.smoothing import places
from qzo.model.zeroqat_format import BITS, LatentConfig
from qzo.quantize.initialize import Initialization, initialize
from qzo.quantize.inputs import decoder_layers
from qzo.quantize.resume import LayerWriter
from qzo.quantize.walk import linears as names_of_linears


def settings(bits: int | None, group_size: int | None, activations: int | None) -> LatentConfig:
    """None: 4 bits; whole rows with low-bit activations, else groups of 128; activations of 16 bits. Smoothing belongs to low-bit activations.

    Raises BadInput for other values.
    """
    bits, activations = 4 if bits is None else bits, 16 if activations is None else activations
    group_size = (-1 if activations < 16 else 128) if group_size is None else group_size
    if bits not in BITS:
        raise BadInput("bits", f"{bits} with method zeroqat", ", ".join(map(str, BITS)))
    if activations not in ACTIVATION_BITS:
        raise BadInput("activations", str(activations), ", ".join(map(str, ACTIVATION_BITS)))
    if group_size != -1 and group_size < 1:
        raise BadInput("group_size", str(group_size), "a positive whole number, or -1 for whole rows")
    if activations < 16 and group_size != -1 and group_size % 32:
        raise BadInput("group_size", f"{group_size} with activations of {activations} bits", "a multiple of 32, or -1: products are of integers")
    return LatentConfig(bits, group_size, activations=activations, smoothing=activations < 16)


class LatentWalk:
    """As quantize/walk.py's Walk is, for the quantizer and the latents of every decoder layer; `say(text)` is called for every choice within one.

    In fp32, whatever the device: choices are by small differences of errors.

    The error of a layer stands for each of its Linears: that of its output, relative, by what the layer itself adds.
    """

    def __init__(self, model: nn.Module, folder: Folder, config: LatentConfig, device: torch.device):
        self.model, self.folder, self.config, self.device = model, folder, config, device
        self.prefix, self.layers = decoder_layers(model)
        self.say: Callable[[str], None] = lambda text: None
        if config.smoothing:
            places(self.layers[0])  # on meta: what cannot be smoothed is refused before any work

    def documents(self, names: list[str]) -> tuple[dict[str, Any], dict[str, dict]]:
        """(quantization_config, no further JSON files)."""
        return self.config.to_dict(), {}

    def run(
        self, windows: Tensor, writer: LayerWriter, report: Callable[[list[str], float], None], check: Callable[[], None] = lambda: None
    ) -> None:
        """Search the layers that `writer` does not hold yet; `check` is called before every choice, and may raise."""
        done, linears = len(writer.layers), [names_of_linears(layer) for layer in self.layers]
        if done == len(self.layers):
            return

        def keep(index: int, state: dict[str, Tensor], error: float) -> None:
            prefix = f"{self.prefix}.{index}"
            for name, tensor in state.items():
                stored = self.folder.read(f"{prefix}.{name}").dtype if name.endswith(".weight") else tensor.dtype
                writer.add(f"{prefix}.{name}", tensor.to(stored))
            names = [f"{prefix}.{name}" for name in linears[index]]
            writer.end_layer([error] * len(names))
            report(names, error)

        def said(text: str) -> None:
            check()
            self.say(text)

        config = self.config
        what = Initialization(config.precision, config.smoothing, clipping=True, compensation=config.compensation, reconstruct=config.reconstruction)
        initialize(self.model, self.folder, windows, what, self.device, torch.float32, keep, said, done, writer.read)
