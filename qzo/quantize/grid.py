"""The grid of one group of weights: w ≈ scale·(code - zero), codes 0 … 2^bits - 1.

Min-max (sym: zero fixed to 2^(bits-1), scale = 2·max|w| / (2^bits - 1), as in GPTQ), or the part of that range with
the least squared error, weighed by column. Scales are rounded to fp16, as they lie on disk, before any code is computed.

The search is GPTQ's only: with its weights it lowers perplexity, without any weights, for rounding to nearest, it raises it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qzo.model.gptq_format import GptqConfig

RATIOS = [1 - 0.03 * i for i in range(1, 20)]
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16


@dataclass
class Quantized:
    """One quantized weight [N, K]: codes uint8 [N, K] in the model's column order, scales fp32 [N, G] that fp16 holds
    exactly, zeros uint8 [N, G], g_idx int32 [K] (the group of each column)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def dequantize(self) -> Tensor:
        """W[n, k] = scales[n, g_idx[k]]·(codes[n, k] - zeros[n, g_idx[k]]), fp32 [N, K]."""
        group = self.g_idx.long()
        return self.codes.float().sub_(self.zeros[:, group]).mul_(self.scales[:, group])


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, as fp32; the three tensors broadcast."""
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def fit_grid(weight: Tensor, config: GptqConfig, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero fp32 [N, 1] for one group of weights fp32 [N, g].

    With `importance` fp32 [g], the weight of each column's squared error, the range that loses least is taken, else
    the whole range. An asymmetric zero is at least 1 in format v1, which cannot store a 0 that all readers agree on;
    the range is covered all the same.
    """
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    best_scale, best_zero = _grid(low, high, config)
    if importance is None:
        return best_scale, best_zero
    best = _error(weight, best_scale, best_zero, config.bits, importance)
    for ratio in RATIOS:
        scale, zero = _grid(low * ratio, high * ratio, config)
        error = _error(weight, scale, zero, config.bits, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _grid(low: Tensor, high: Tensor, config: GptqConfig) -> tuple[Tensor, Tensor]:
    top = 2**config.bits - 1
    if config.sym:
        scale = _as_fp16(2 * torch.maximum(-low, high) / top)
        return scale, torch.full_like(scale, 2 ** (config.bits - 1))
    least = 0 if config.v2 else 1
    scale = _as_fp16(torch.maximum((high - low) / top, high / (top - least)))
    return scale, torch.round(-low / scale).clamp_(least, top)


def _as_fp16(scale: Tensor) -> Tensor:
    """Rounded to fp16; never 0, so that a group of zeros is safe."""
    return scale.clamp(_SMALLEST, _LARGEST).half().float()


def _error(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor) -> Tensor:
    error = round_to_grid(weight, scale, zero, bits).sub_(zero).mul_(scale).sub_(weight)
    return (error.square_() @ importance).unsqueeze(1)
