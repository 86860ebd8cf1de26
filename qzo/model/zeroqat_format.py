"""The latent checkpoint of ZeroQAT on disk: the 16-bit model, the weights of its Linears latent, and beside it the quantizer of every decoder layer.

config.json, quantization_config: quant_method "qzo_zeroqat", version 1, bits, group_size, activations, smoothing.
Per decoder layer, fp32: what `quantizer_state` of model/qat.py names, after the layer's own name:

    <linear>.low, .high, .factor, .move [N, G]      <linear>.span [1]      <layer>.sites.<site>.scale, .shift [entries]
"""

from dataclasses import dataclass
from typing import Any

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.qat import ACTIVATION_BITS, Precision
from qzo.model.uniform import Quantization, check_bits, check_group_size, raw_config

METHOD, VERSION = "qzo_zeroqat", 1
BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class LatentConfig(Quantization):
    """bits of a token's channels, and of q, k, v, beside those of weights; 16: none. smoothing: the layers have sites.

    Which a reader need not know: compensation, the latents are those of quantize/compensate.py; reconstruction, the epochs of
    quantize/reconstruct.py, written where there were any.
    """

    sym: bool = False
    version: str = "zeroqat"
    activations: int = 16
    smoothing: bool = False
    compensation: bool = False
    reconstruction: int = 0

    @property
    def precision(self) -> Precision:
        return Precision(self.bits, self.group_size, self.activations)

    def to_dict(self) -> dict[str, Any]:
        """config.json's quantization_config."""
        return {"quant_method": METHOD, "version": VERSION, "bits": self.bits, "group_size": self.group_size,
                "activations": self.activations, "smoothing": self.smoothing, "compensation": self.compensation,
                **({"reconstruction": self.reconstruction} if self.reconstruction else {})}  # fmt: skip


def latent_config(folder: Folder) -> LatentConfig | None:
    """The precision and smoothing of a latent checkpoint, None for any other folder. Raises BadInput for newer versions and wrong values."""
    found = raw_config(folder)
    if found is None or found[0].get("quant_method") != METHOD:
        return None
    bits, group_size, activations, smoothing = checked(*found, VERSION)
    epochs = found[0].get("reconstruction")
    return LatentConfig(bits, group_size, activations=activations, smoothing=smoothing, compensation=found[0].get("compensation") is True,
                        reconstruction=epochs if type(epochs) is int else 0)  # fmt: skip


def checked(raw: dict, where: str, version: int) -> tuple[int, int, int, bool]:
    """bits, group_size, activations and smoothing of a quantization_config of this project's own formats. Raises BadInput, by name."""
    if type(raw.get("version")) is not int or raw["version"] != version:
        raise BadInput(where, f"version {raw.get('version')!r} of {raw.get('quant_method')}", f"version {version}", "It may need another qzo.")
    check_bits(where, raw.get("bits"), BITS, "2, 3, 4, 6 or 8")
    check_group_size(where, raw.get("group_size"))
    if type(raw.get("activations")) is not int or raw["activations"] not in ACTIVATION_BITS:
        raise BadInput(where, f"activations {raw.get('activations')!r}", "4, 6, 8 or 16")
    if type(raw.get("smoothing")) is not bool:
        raise BadInput(where, f"smoothing {raw.get('smoothing')!r}", "true or false")
    bits, size, activations = raw["bits"], raw["group_size"], raw["activations"]
    if activations < 16 and size != -1 and size % 32:
        raise BadInput(where, f"group_size {size} with activations of {activations} bits", "a multiple of 32, or -1 for whole rows: products are of integers")
    return bits, size, activations, raw["smoothing"]
