"""Low-bit activations in plain PyTorch: the definition of correct for the a8_*.py, and the path of a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qzo_kernels.pack import untile_codes
from qzo_kernels.reference_qat import row_grid

LARGEST = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # kind: dtype, largest magnitude used


def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(q [M, K] int8 or e4m3, scale f32 [M]) of x [M, K]: q = round(x · (L/m)), scale = m/L, m = max |x| of the row.

    L = 127 or 448, ties to even, everything in fp32. Rows with m < 1e-30 give q = 0 and scale 0; rows with an infinity or a NaN
    give q = 0 and scale NaN.
    """
    dtype, largest = LARGEST[kind]
    x = x.float()
    m = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    tiny, broken = m < 1e-30, ~m.isfinite()
    limit = torch.tensor(largest, device=x.device)
    q = (x * (limit / m).masked_fill(tiny, 0)[:, None]).masked_fill(broken[:, None], 0)
    scale = (m / limit).masked_fill(tiny, 0).masked_fill(broken, float("nan"))
    return (q.round() if kind == "int8" else q).to(dtype), scale


def quantize_rows_asym(x: Tensor, bits: int, span: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [M, K], scale f32 [M], shift f32 [M]) of x [M, K]: scale·q + shift is x̂ of `reference_qat.fake_quantize_rows`.

    q = code - 2^(bits - 1), scale = Δ, shift = Δ·(2^(bits - 1) - z), in fp32; the codes are those of x̂, bit for bit. Rows with an
    infinity or a NaN, or whose Δ or z overflows, give q = 0 and scale and shift NaN. span f32 [1], None for 1.
    """
    x, half = x.float(), 1 << (bits - 1)
    step, zero = row_grid(x, bits, span)
    broken = ~((step * 0 + zero * 0) == 0)
    q = (x / step).round_().add_(zero).clamp_(0, 2 * half - 1).sub_(half).masked_fill_(broken, 0)
    scale = step.masked_fill(broken, float("nan"))
    return q.to(torch.int8), scale[:, 0], (scale * (half - zero))[:, 0]


def code_sums(codes: Tensor, zeros: Tensor | None, bits: int, group_size: int, cols: int) -> Tensor:
    """int32 [N, G]: Σ of code - zero over the groups of a weight's rows; codes and zeros as `unpack` has them."""
    size = min(group_size, cols)
    weight = torch.empty(len(codes), cols, dtype=torch.int8, device=codes.device)
    unpack(codes, zeros, bits, size, weight)
    sums = pad(weight, (0, -cols % size)).unflatten(1, (-1, size)).sum(2, dtype=torch.int32)
    if bits == 8 and zeros is not None:
        width = (cols - torch.arange(0, cols, size, device=codes.device)).clamp_(max=size)
        sums += ((128 - zeros.int()) * width).int()
    return sums


def row_sums(scales: Tensor, sums: Tensor) -> Tensor:
    """f32 [V, N]: the sums over the rows of weights of scales f32 [V, N, G] whose codes have the sums int32 [N, G]."""
    return (scales * sums).sum(-1)


def unpack(codes: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor) -> None:
    """Weights q - zero into `out` [N, K], int8 or e4m3: exact. For 8 bits q - 128, whatever the zeros, or the e4m3 bytes q as they are.

    codes int32 [N, tiled_words(K, bits)]; zeros uint8 [N, G] (any strides), or None where all are 2^(bits - 1).
    """
    q = untile_codes(codes, bits, out.shape[1])
    if bits == 8 and out.dtype != torch.int8:
        out.copy_(q.to(torch.uint8).view(out.dtype))
    elif zeros is None or bits == 8:
        out.copy_(q - (1 << (bits - 1)))
    else:
        out.copy_(q - _spread(zeros, group_size, q.shape[1]).to(torch.int16))


def _spread(grouped: Tensor, group_size: int, cols: int) -> Tensor:
    """[R, G] to [R, cols]: every column sees its group's value."""
    return grouped[:, torch.arange(cols, device=grouped.device) // group_size]


def group_sums(q: Tensor, group_size: int) -> Tensor:
    """[M, G] sums of [M, K] over the groups of columns: int32 of int8, f32 of e4m3."""
    wide = q if q.dtype == torch.int8 else q.float()
    return torch.stack([part.sum(1, dtype=torch.int32 if wide is q else None) for part in wide.split(group_size, 1)], 1)


def a8_matmul(
    xq: Tensor, x_scale: Tensor, wq: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype,
    bias: Tensor | None = None, zeros: Tensor | None = None, shift: Tensor | None = None, wsum: Tensor | None = None,
) -> Tensor:
    """y [M, N] of `dtype`: x_scale[m] · Σ_g s[v, n, g] · (Σ_{k in g} xq·wq + (128 - zero[n, g]) · Σ_{k in g} xq)
    + shift[m] · wsum[v, n] + bias[n], the last two if given.

    xq [M, K] and wq [N, K] both int8 or both e4m3; x_scale f32 [M]; scales f32 [V, N, G], G = ceil(K/group_size), of which the rows
    of xq, cut into V equal consecutive blocks, see one each; bias [N]. `zeros` uint8 [N, G], only with int8, belong to
    8-bit codes of which wq holds q - 128; without them the second sum is 0. shift f32 [M] and wsum f32 [V, N] are those of
    `quantize_rows_asym` and `row_sums`. In fp64 (integer sums are exact), rounded once.
    """
    x, total = xq.double(), torch.zeros(len(xq), len(wq), dtype=torch.float64, device=xq.device)
    blocks = list(zip(total.chunk(len(scales)), x.chunk(len(scales)), scales.double(), strict=True)) if len(x) else []
    for g, columns in enumerate(torch.arange(xq.shape[1], device=xq.device).split(group_size)):
        w = wq[:, columns[0] : columns[-1] + 1].double()
        for y, part, scale in blocks:
            part = part[:, columns[0] : columns[-1] + 1]
            product = part @ w.t()
            if zeros is not None:
                product += part.sum(1, keepdim=True) * (128 - zeros[:, g].double())
            y += product * scale[:, g]
    total *= x_scale.double()[:, None]
    if shift is not None and len(x):
        for y, part, sums in zip(total.chunk(len(scales)), shift.double().chunk(len(scales)), wsum.double(), strict=True):
            y += part[:, None] * sums
    return (total if bias is None else total + bias.double()).to(dtype)
