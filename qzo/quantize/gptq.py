"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one by one, and the rest makes up for the error.

With H = XᵀX of the layer's inputs and U the upper Cholesky factor of its inverse, H⁻¹ = UᵀU (equations 2 and 3 and
section 3.3 of the paper): for k = 1 … K

    e_k = (w_k - quant(w_k)) / U_kk        w_j ← w_j - e_k·U_kj   for j > k

Columns go by descending diag(H). With desc_act groups are made of columns in that order (g_idx scattered on disk);
without it groups stay contiguous, whole groups go by their total and columns within a group by their own diag(H).
"""

import torch
from torch import Tensor

from qzo.errors import RunFailed
from qzo.model.gptq_format import GptqConfig
from qzo.quantize.grid import Quantized, fit_grid, round_to_grid

BLOCK = 128
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)


def quantize_weight(
    weight: Tensor, config: GptqConfig, hessian: Tensor, grid: tuple[Tensor, Tensor] | None = None
) -> Quantized:  # fmt: skip
    """Quantize weight fp32 [N, K] for inputs of second moment `hessian` fp32 [K, K], up to a factor.

    grid: (scales, zeros) fp32 [N, G] to round on; None: fitted to each group as it is reached. Raises RunFailed when the Hessian cannot be inverted even with heavy damping: it is not finite.
    """
    rows, cols = weight.shape
    order, g_idx = column_order(hessian.diagonal(), config)
    # Reversed, H = LLᵀ turns into a factor of the inverse whose triangle is the upper one.
    backwards = order.flip(0)
    factor = inverse_factor(hessian.index_select(0, backwards).index_select(1, backwards))
    pivots = factor.diagonal()
    w = weight.t()[order].contiguous()  # [K, N]: a column of the weight is a contiguous row
    codes = torch.empty(cols, rows, dtype=torch.uint8, device=weight.device)
    groups, sizes = torch.unique_consecutive(g_idx[order], return_counts=True)
    scales = torch.empty(rows, len(groups), device=weight.device)
    zeros = torch.empty(rows, len(groups), dtype=torch.uint8, device=weight.device)
    stop = 0
    for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
        start, stop = stop, stop + size
        scale, zero = [part[:, group, None] for part in grid] if grid else fit_grid(w[start:stop].t(), config, pivots[start:stop] ** -2)
        scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0].to(torch.uint8)
        for a in range(start, stop, BLOCK):
            b = min(a + BLOCK, stop)
            error = _quantize_block(w[a:b], codes[a:b], factor[a:b, a:b], scale[:, 0], zero[:, 0], config.bits)
            w[b:].addmm_(factor[a:b, b:].t(), error, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return Quantized(result.t().contiguous(), scales, zeros, g_idx)


def _quantize_block(w: Tensor, codes: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round the columns w [b, N] of one group in order, filling `codes`; returns their errors e [b, N]."""
    error = torch.empty_like(w)
    pivots = factor.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        code = round_to_grid(w[i], scale, zero, bits)
        codes[i] = code
        error[i] = (w[i] - (code - zero) * scale) / pivot
        w[i + 1 :].addr_(factor[i, i + 1 :], error[i], alpha=-1)
    return error


def column_order(diagonal: Tensor, config: GptqConfig) -> tuple[Tensor, Tensor]:
    """The order int64 [K] in which columns are rounded, and g_idx int32 [K]; columns of a group follow one another."""
    cols = diagonal.shape[0]
    size = config.group(cols)
    index = torch.arange(cols, device=diagonal.device) // size
    order = torch.argsort(diagonal, descending=True, stable=True)
    if config.desc_act:
        g_idx = torch.empty_like(index)
        g_idx[order] = index
        return order, g_idx.to(torch.int32)
    totals = torch.stack([part.sum() for part in diagonal.split(size)])
    rank = torch.argsort(torch.argsort(totals, descending=True, stable=True))
    return order[torch.argsort(rank[index[order]], stable=True)], index.to(torch.int32)


def inverse_factor(backwards: Tensor) -> Tensor:
    """U fp32 [K, K], upper triangular with (H + damping)⁻¹ = UᵀU, for H with rows and columns in reverse; its diagonal is overwritten.

    The damping, a share of the mean of the diagonal, grows until the factorization succeeds. It is all that columns
    never active have: no error goes from or to them, they are rounded to nearest.
    """
    diagonal = backwards.diagonal().clone()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    for damping in DAMPING:
        backwards.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            del backwards
            _invert(lower)
            _reverse(lower)
            return lower
        del lower
    raise RunFailed("gptq", "a Hessian that is not positive definite", "finite activations",
                    "Check the model's weights and the calibration text.")  # fmt: skip


def _invert(lower: Tensor, block: int = 1024) -> None:
    """A lower triangular matrix becomes its inverse X, in place, for at K = 13824 each matrix is 0.76 GB.

    By block rows: X_ij = -X_ii·(Σ_k L_ik·X_kj) for j < i, where row i of L is read for the last time as row i of X is written.
    """
    for a in range(0, len(lower), block):
        rows, before = lower[a : a + block], lower[:a, :a]
        size = len(rows)
        corner = torch.linalg.solve_triangular(rows[:, a : a + size], torch.eye(size, device=lower.device), upper=False)
        rows[:, :a] = (corner @ (rows[:, :a] @ before)).neg_()
        rows[:, a : a + size] = corner


def _reverse(matrix: Tensor, step: int = 1 << 24) -> None:
    """The last row and column of a square matrix become its first, in place."""
    flat = (matrix if matrix.is_contiguous() else matrix.t()).view(-1)
    count = len(flat)
    for a in range(0, count // 2, step):
        b = min(a + step, count // 2)
        first = flat[a:b].flip(0)
        flat[a:b] = flat[count - b : count - a].flip(0)
        flat[count - b : count - a] = first
