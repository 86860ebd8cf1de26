"""Latents that begin where GPTQ (arXiv 2210.17323) ends: on the grid that a quantizer has, rounded so that the errors make up for one another.

GPTQ gives every weight a code; the latent goes to the nearest point of that code's cell, MARGIN steps around its middle at most. A weight
whose code is that of rounding to nearest hardly moves, and one that was rounded the other way stays near the bound that it crossed.
"""

import torch
from qzo_kernels.reference_qat import grouped
from torch import Tensor

from qzo.model.gptq_format import GptqConfig
from qzo.model.qat import FakeQuantLinear
from qzo.quantize.gptq import quantize_weight

BITS = (2, 3, 4)  # above, 16-bit latents do not resolve a cell, and nothing is lost that would be worth it
MARGIN = 0.45


def compensated(linear: FakeQuantLinear, hessian: Tensor) -> Tensor:
    """The latent fp32 [N, K] for inputs of second moment `hessian` fp32 [K, K], of what `linear.received` gives, up to a factor.

    The largest and the smallest weight of a group stay, and with them the grid. Raises RunFailed for a Hessian that is not finite.
    """
    bits, size = linear.precision.bits, linear.precision.group_size
    weight = linear.smoothed()
    codes = quantize_weight(weight, GptqConfig(bits, size, sym=False), hessian, (linear.step, linear.zero)).codes.float()
    parts, zero, step = grouped(codes, size), linear.zero[..., None], linear.step[..., None]
    low = torch.where(parts == 0, -torch.inf, (parts - zero - MARGIN) * step)
    high = torch.where(parts == (1 << bits) - 1, torch.inf, (parts - zero + MARGIN) * step)
    groups = grouped(weight, size)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    moved = groups.clamp(low, high).clamp(least, most)
    moved = torch.where((groups == least) | (groups == most), groups, moved)
    s_in, s_out = linear.scales()
    latent = moved.flatten(-2)[:, : weight.shape[1]].contiguous()
    latent = latent if s_out is None else latent * s_out[:, None]
    return latent if s_in is None else latent / s_in
