"""What lies between the matmuls of a decoder, in plain PyTorch: the definition of correct, with transformers' roundings."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(normed, sum) of x's dtype: sum = x + residual, rounded once (x itself without one); normed = weight·round(sum / rms).

    x and residual [..., H], weight [H]; rms = √(mean(sum²) + eps) over the last dimension, in fp32.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """round(silu(gate))·up of gate's dtype, silu in fp32: the middle of SwiGLU. gate and up [..., I]."""
    return torch.nn.functional.silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, Hq, T, D] and k [B, Hk, T, D], rotated: x·cos + rotate_half(x)·sin, each product rounded to the dtype.

    q [B, T, Hq·D], k [B, T, Hk·D], cos and sin [T, D]. The results lie in memory as [B, T, heads, D].
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    low, high = heads.chunk(2, -1)
    turned = heads * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
    return turned.transpose(1, 2)
