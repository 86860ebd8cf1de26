"""The kernels in plain PyTorch: the definition of correct, and the path of every device that is not CUDA.

The noise is reference_noise.py's and comes along under its names.
"""

import torch
from torch import Tensor

from qzo_kernels.pack import untile_codes
from qzo_kernels.reference_noise import gaussian, integer_normal, normal_table, philox, rademacher, uniform24

__all__ = [
    "dequantize", "gaussian", "integer_normal", "normal_table", "perturb", "philox", "quant_matmul",
    "rademacher", "uniform24", "update_",
]  # fmt: skip
_CHUNK = 1 << 17  # elements dequantized at a time: the fp32 intermediate stays in the cache


def perturb(
    values: Tensor, state: Tensor, eps: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> Tensor:
    """What V forwards see: f32 [V, R, C], max(v·(1 + ε z), floor) if `relative`, else max(v + ε z, floor).

    values f32 [R, C]; state int64 [V, 3], rows (seed, step, direction); eps f32 [V], signed: 0 gives a copy of `values`.
    The order of operations is fixed and without FMA: with Rademacher z every device computes the same bits.
    """
    out = values.repeat(len(eps), 1, 1)
    for moved, (seed, step, direction), e in zip(out, state.tolist(), eps, strict=True):
        if e.item():
            noise = _noise(values, seed, step, direction, uid, gaussian).mul_(e)
            moved.mul_(noise.add_(1)) if relative else moved.add_(noise)
            moved.clamp_(min=floor)
    return out


def update_(
    values: Tensor, state: Tensor, coefs: Tensor, uid: int, floor: float, relative: bool, gaussian: bool
) -> None:
    """Apply S steps in place, one after another: max(v·(1 − c), floor) or max(v − c, floor), c = Σ_i coefs[s, i]·z_i.

    values f32 [R, C]; state int64 [2] = (seed, first step); coefs f32 [S, D], summed in direction order in fp32.
    Coefficients of 0 change no bit of values ≥ floor.
    """
    seed, first = state.tolist()
    at_once = max(1, _CHUNK // values.numel())
    for start in range(0, len(coefs), at_once):
        rows = coefs[start : start + at_once]
        steps = first + start
        if len(rows) > 1:
            steps = torch.arange(first + start, first + start + len(rows), device=values.device)
        c = torch.zeros(len(rows), *values.shape, device=values.device)
        for direction in range(coefs.shape[1]):
            if rows[:, direction].any():
                c += _noise(values, seed, steps, direction, uid, gaussian) * rows[:, direction, None, None]
        for moved in c:
            if relative:
                values.mul_(1 - moved)
            else:
                values.sub_(moved)
            values.clamp_(min=floor)


def _noise(like: Tensor, seed: int, step: int | Tensor, direction: int, uid: int, is_gaussian: bool) -> Tensor:
    return (gaussian if is_gaussian else rademacher)(like.shape, seed, step, direction, uid, like.device)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int, dtype: torch.dtype,
    out: Tensor | None = None, codebook: Tensor | None = None,
) -> Tensor:
    """Weights [N, cols] of `dtype`: scale·(q − zero) in fp32, rounded once; with `codebook` f32 [2**bits], and without zeros,
    scale·codebook[q]. Column k is of group k // group_size.

    codes int32 [N, tiled_words(cols, bits)] as pack.tile_codes lays them out; scales f32 [N, G] and zeros uint8 [N, G] (any
    strides; None: 2**(bits − 1) everywhere), G = ceil(cols/group_size); the last group may be partial. `out` [N, cols] of `dtype` is filled and returned if given.
    """
    rows, full, middle = codes.shape[0], cols // group_size, 1 << (bits - 1) if codebook is None else 0
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device) if out is None else out
    chunk = max(1, _CHUNK // max(cols, 1))
    buffer = torch.empty(min(chunk, rows), cols, dtype=torch.float32, device=codes.device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        target = out[part]
        w = target if dtype == torch.float32 else buffer[: target.shape[0]]
        q = untile_codes(codes[part], bits, cols)
        w.copy_(q if codebook is None else codebook.index_select(0, q.flatten().int()).view(q.shape))
        if full:
            grouped = w[:, : full * group_size].unflatten(1, (full, group_size))
            grouped.sub_(middle if zeros is None else zeros[part, :full, None]).mul_(scales[part, :full, None])
        if full * group_size < cols:
            w[:, full * group_size :].sub_(middle if zeros is None else zeros[part, full:]).mul_(scales[part, full:])
        if w is not target:
            target.copy_(w)
    return out


def quant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, bias: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """y [M, N] of x's dtype, y = x·Wᵀ + bias in fp32 with W of `dequantize`, rounded once.

    x [M, K] floating; scales f32 [V, N, G], as `perturb` gives them: the rows of x, cut into V equal consecutive blocks,
    see one each. bias [N] of x's dtype.
    """
    parts = []
    for part, seen in zip(x.chunk(len(scales)), scales, strict=True):
        y = part.float() @ dequantize(codes, seen, zeros, bits, group_size, x.shape[1], torch.float32, codebook=codebook).t()
        parts.append((y if bias is None else y + bias.float()).to(x.dtype))
    return torch.cat(parts)
