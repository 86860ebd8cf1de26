"""A Linear of ZeroQAT as it is served: the latents are gone, codes on the frozen grid and one bias are left.

    y = Q_a(x) · Q(S; Δ, z)ᵀ + offset        codes = clamp(round(S / Δ) + z, 0, 2^b - 1), scales = Δ, zeros = z, bias = offset

so that scales·(codes - zeros) is Q(S; Δ, z) bit for bit. Codes of 6 bits lie in fields of 8.
"""

from dataclasses import dataclass

import torch
from qzo_kernels.pack import tile_codes, untile_codes
from qzo_kernels.reference_qat import grid_codes
from torch import Tensor

from qzo.model.linear import QuantLinear, Scratch
from qzo.model.qat import FakeQuantLinear
from qzo.model.uniform import InputGrid, LayerTensors, plain_zeros


def field(bits: int) -> int:
    """The width of the fields that codes of so many bits lie in."""
    return 8 if bits == 6 else bits


@dataclass
class Packed:
    """codes uint8 [N, K]; step fp32 and zero uint8 [N, G]; bias fp32 [N] or None; grid: what the input is rounded to. All on one device."""

    codes: Tensor
    step: Tensor
    zero: Tensor
    bias: Tensor | None
    grid: InputGrid

    def parts(self) -> dict[str, Tensor]:
        """All of it by name; absent what is None."""
        found = {"codes": self.codes, "step": self.step, "zero": self.zero, "bias": self.bias}
        found |= {key: getattr(self.grid, key) for key in ("span", "shift", "divisor")}
        return {key: value for key, value in found.items() if value is not None}


def packed(layer: FakeQuantLinear | QuantLinear) -> Packed:
    """What such a layer computes with now; of a QuantLinear what `quant_linear` was given."""
    if isinstance(layer, QuantLinear):
        codes = untile_codes(layer.codes, layer.bits, layer.in_features).to(torch.uint8)
        zero = torch.full(layer.scales.shape, 1 << (layer.bits - 1), dtype=torch.uint8, device=codes.device) if layer.zeros is None else layer.zeros
        bias = None if layer.bias is None else layer.bias.data.float()
        return Packed(codes, layer.scales.data, zero, bias, InputGrid(layer.input_bits, layer.span, layer.shift, layer.divisor))
    bits, size = layer.precision.bits, layer.precision.group_size
    codes = grid_codes(layer.smoothed(), layer.step, layer.zero, bits, size).to(torch.uint8)
    grid = InputGrid(layer.precision.activations, None if layer.span is None else layer.span.data)
    if layer.own:
        grid.shift, grid.divisor = layer.before.shift().clone(), layer.before.scale().clone()
    return Packed(codes, layer.step, layer.zero.to(torch.uint8), layer.offset, grid)


def quant_linear(name: str, layer: FakeQuantLinear, dtype: torch.dtype, scratch: Scratch | None = None) -> QuantLinear:
    """The QuantLinear that takes the layer's place in a model of `dtype`. The latents are not held."""
    found, bits, cols = packed(layer), field(layer.precision.bits), layer.in_features
    size = cols if layer.precision.group_size == -1 else layer.precision.group_size
    tensors = LayerTensors(tile_codes(found.codes, bits), found.step.clone(), plain_zeros(found.zero, bits), None, grid=found.grid)
    return QuantLinear(name, tensors, bits, size, cols, None if found.bias is None else found.bias.to(dtype), scratch)
