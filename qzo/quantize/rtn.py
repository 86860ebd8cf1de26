"""Round to nearest: every weight to the closest point of its group's grid; needs no data."""

import torch
from torch import Tensor

from qzo.model.gptq_format import GptqConfig
from qzo.quantize.grid import Quantized, fit_grid, round_to_grid


def quantize_weight(weight: Tensor, config: GptqConfig, hessian: Tensor | None = None) -> Quantized:
    """Quantize weight fp32 [N, K]; the Hessian is not used."""
    cols = weight.shape[1]
    size = config.group(cols)
    codes, scales, zeros = [], [], []
    for group in weight.split(size, dim=1):
        scale, zero = fit_grid(group, config)
        codes.append(round_to_grid(group, scale, zero, config.bits).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero.to(torch.uint8))
    g_idx = torch.arange(cols, device=weight.device, dtype=torch.int32) // size
    return Quantized(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), g_idx)
