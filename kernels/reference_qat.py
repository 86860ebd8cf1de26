"""Fake quantization in plain PyTorch, the arithmetic of ZeroQAT (arXiv 2509.00031): the definition of correct for kernels to come.

Weights, asymmetric and uniform, by row and group of columns; c_low, c_high fp32 [N, G] are the logits of LWC's two bounds:

    low  = sigmoid(c_low) · min(0, min_g W)      high = sigmoid(c_high) · max(0, max_g W)
    Δ    = max((high - low) / (2^b - 1), FLOOR)  z    = round(-low / Δ), a code: 0 … 2^b - 1
    Q(W) = Δ · (clamp(round(W / Δ) + z, 0, 2^b - 1) - z)

A logit of 3 keeps 95 % of a side, +infinity all of it: rounding to nearest without clipping. The range holds 0, so that z is a code and a
packed checkpoint can store it. (Δ, z) are computed apart from Q: once per update, and frozen across the ± pair of a step.

Activations, by row (a token; a token and head for q, k, v of attention), with nothing learned or kept:

    Δ = max((high - low) / (2^b - 1), FLOOR),   z = round(-low / Δ),   x̂ = Δ · (clamp(round(x / Δ) + z, 0, 2^b - 1) - z)
    low = min x, times r where it is negative,  high = max x, times r where it is positive

The range is the row's own, without 0 if 0 is not in it; r, the span, is 1 in the paper. 16 bits are no quantization. All in fp32, ties to
even.
"""

import torch
from torch import Tensor

FLOOR = 2.0**-24  # of a step: the smallest number of fp16, in which a checkpoint holds it


def clipped_grid(weight: Tensor, bits: int, group_size: int, low: Tensor | None = None, high: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Δ, z) fp32 [N, G] of weight fp32 [N, K]; low and high are logits fp32 [N, G], None for no clipping.

    group_size -1 is a whole row; the last group may be shorter.
    """
    groups = grouped(weight, group_size)
    least, most = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    return bounded_grid(least if low is None else least * low.sigmoid(), most if high is None else most * high.sigmoid(), bits)


def bounded_grid(least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(Δ, z) of the ranges least ≤ 0 ≤ most, of any one shape."""
    top = (1 << bits) - 1
    step = ((most - least) / top).clamp_(min=FLOOR)
    return step, (-least / step).round_().clamp_(0, top)


def fake_quantize(weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """Q(W) fp32 [N, K] of weight fp32 [N, K] on the grid step, zero fp32 [N, G]. `weight` is left as it is."""
    return rounded(grouped(weight, group_size), step[..., None], zero[..., None], bits).flatten(-2)[..., : weight.shape[-1]]


def rounded(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Δ · (clamp(round(x / Δ) + z, 0, 2^b - 1) - z); the three tensors broadcast."""
    return (x / step).round_().add_(zero).clamp_(0, (1 << bits) - 1).sub_(zero).mul_(step)


def fake_quantize_rows(x: Tensor, bits: int, span: Tensor | None = None) -> Tensor:
    """x̂ of x [..., C], each row by its own range, in the dtype of x. 16 bits give x itself. span fp32 [1]: r; None is 1."""
    if bits == 16:
        return x
    wide = x.float()
    return rounded(wide, *row_grid(wide, bits, span), bits).to(x.dtype)


def row_grid(x: Tensor, bits: int, span: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Δ, z) fp32 [..., 1] of the rows of x fp32 [..., C], as `fake_quantize_rows` takes them."""
    least, most = x.aminmax(dim=-1, keepdim=True)
    if span is not None:
        least, most = torch.where(least < 0, least * span, least), torch.where(most > 0, most * span, most)
    # On CUDA a number divides by its reciprocal, a tensor by itself.
    step = ((most - least) / x.new_full((), (1 << bits) - 1)).clamp_(min=FLOOR)
    return step, (-least / step).round_()


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[..., K] to [..., G, g]; a shorter last group repeats its last column, which changes neither its range nor what is cut off again."""
    cols = weight.shape[-1]
    size = cols if group_size == -1 else group_size
    if cols % size:
        weight = torch.cat((weight, weight[..., -1:].expand(*weight.shape[:-1], -cols % size)), -1)
    return weight.unflatten(-1, (-1, size))
