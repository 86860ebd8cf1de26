"""GPTQ against its definition: remove one column at a time from the inverse Hessian and spread its error."""

import pytest
import torch

from qzo.errors import RunFailed
from qzo.model.gptq_format import GptqConfig
from qzo.quantize import gptq, rtn
from qzo.quantize.grid import fit_grid, round_to_grid
from qzo.quantize.gptq import column_order, inverse_factor, quantize_weight


def correlated(rows: int, cols: int) -> torch.Tensor:
    """Inputs [rows, cols] of rank about cols/4 plus noise, columns of very different size."""
    mixed = torch.randn(rows, cols // 4) @ torch.randn(cols // 4, cols) + 0.3 * torch.randn(rows, cols)
    return mixed * torch.logspace(-1, 1, cols)[torch.randperm(cols)]


def by_definition(weight: torch.Tensor, config: GptqConfig, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Codes [N, K] of optimal brain quantization in GPTQ's order: equation 2 and 3 of the paper, in fp64."""
    w, cols = weight.double().clone(), weight.shape[1]
    order, g_idx = column_order(hessian.diagonal(), config)
    inverse = torch.linalg.inv(hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(cols))
    pivots = inverse_factor(hessian[order][:, order].flip(0, 1)).diagonal()
    importance = torch.empty(cols)
    importance[order] = pivots**-2
    codes, grids = torch.zeros(weight.shape), {}
    for col in order.tolist():
        group = int(g_idx[col])
        if group not in grids:
            members = order[g_idx[order] == group]
            grids[group] = fit_grid(w[:, members].float(), config, importance[members])
        scale, zero = (t[:, 0] for t in grids[group])
        codes[:, col] = round_to_grid(w[:, col].float(), scale, zero, config.bits)
        error = (w[:, col] - (codes[:, col] - zero) * scale) / inverse[col, col]
        w -= error[:, None] * inverse[col]
        inverse -= inverse[:, col : col + 1] * inverse[col : col + 1] / inverse[col, col].clone()
    return codes


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "size", "cols"), [(2, 32, 96), (3, 40, 100), (4, -1, 60), (4, 160, 200), (8, 16, 48)])
def test_equals_its_definition(bits, size, cols, desc_act):
    torch.manual_seed(bits + cols)
    x = correlated(400, cols)
    weight, hessian = torch.randn(24, cols), x.t() @ x / 400
    config = GptqConfig(bits, size, sym=bits != 3, desc_act=desc_act)
    result = quantize_weight(weight, config, hessian)
    expected = by_definition(weight, config, hessian, gptq.DAMPING[0])
    # fp32 against fp64: a value at a rounding boundary may fall to either side, and its row then goes another way.
    same = (result.codes.float() == expected).float().mean()
    assert same > (0.99 if bits < 8 else 0.9)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_error_is_below_rtn(bits, desc_act, sym):
    torch.manual_seed(bits)
    x, weight = correlated(600, 128), torch.randn(48, 128)
    config = GptqConfig(bits, 32, sym, desc_act)
    ours = quantize_weight(weight, config, x.t() @ x)
    plain = rtn.quantize_weight(weight, config)
    lost = [((x @ (r.dequantize() - weight).t()) ** 2).sum() for r in (ours, plain)]
    assert lost[0] < 0.5 * lost[1]
    assert int(ours.codes.max()) < 2**bits and int(ours.zeros.min()) >= 1 and int(ours.zeros.max()) < 2**bits
    assert torch.equal(ours.scales, ours.scales.half().float())


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("size", [-1, 16, 40])
def test_order_keeps_groups_together(size, desc_act):
    torch.manual_seed(0)
    diagonal = torch.rand(100)
    diagonal[:32] = 0
    order, g_idx = column_order(diagonal, GptqConfig(4, size, desc_act=desc_act))
    width = 100 if size == -1 else size
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(g_idx.long().bincount(), (torch.arange(100) // width).bincount())
    assert len(torch.unique_consecutive(g_idx[order])) == -(-100 // width)
    if desc_act:
        assert torch.equal(diagonal[order], diagonal.sort(descending=True).values)
        return
    assert torch.equal(g_idx.long(), torch.arange(100) // width)
    parts = diagonal[order].split(torch.unique_consecutive(g_idx[order], return_counts=True)[1].tolist())
    assert all(bool((part.diff() <= 0).all()) for part in parts)
    totals = torch.stack([part.sum() for part in parts])
    assert bool((totals.diff() <= 1e-5).all())


@pytest.mark.parametrize("dead", [[5, *range(32, 48)], list(range(64))])
def test_columns_never_active_are_rounded_to_nearest(dead):
    torch.manual_seed(3)
    x, weight, config = correlated(300, 64), torch.randn(16, 64), GptqConfig(8, 16)
    x[:, dead] = 0
    result = quantize_weight(weight, config, x.t() @ x)
    scale, zero = (t.repeat_interleave(16, 1) for t in (result.scales, result.zeros.float()))
    nearest = round_to_grid(weight, scale, zero, 8)
    assert torch.equal(result.codes[:, dead].float(), nearest[:, dead])
    assert len(dead) == 64 or not torch.equal(result.codes.float(), nearest)


def test_damping_grows_until_the_factor_exists():
    torch.manual_seed(4)
    x = torch.randn(3, 64)
    hessian = x.t() @ x
    mean = hessian.diagonal().mean()
    hessian -= 0.2 * mean * torch.eye(64)  # indefinite, as rounding can make it, if never this much
    factor = inverse_factor(hessian.flip(0, 1))
    expected = torch.linalg.inv(hessian + 0.3 * 0.8 * mean * torch.eye(64))
    assert torch.equal(factor, factor.triu()) and torch.allclose(factor.t() @ factor, expected, rtol=1e-3, atol=1e-3 / mean)
    with pytest.raises(RunFailed, match="positive definite"):
        inverse_factor(torch.full((8, 8), float("nan")))


@pytest.mark.parametrize("size", [1, 2, 1024, 1025, 2100])
def test_large_factors_are_inverted_in_blocks(size):
    x = torch.randn(2 * size + 3, size, generator=torch.Generator().manual_seed(size))
    hessian = x.t() @ x / len(x)
    damped = hessian.double() + gptq.DAMPING[0] * hessian.diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert (inverse_factor(hessian.flip(0, 1)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_factor_is_the_cholesky_factor_of_the_inverse():
    torch.manual_seed(5)
    x = torch.randn(200, 40)
    hessian = x.t() @ x
    damped = (hessian + gptq.DAMPING[0] * hessian.diagonal().mean() * torch.eye(40)).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(inverse_factor(hessian.flip(0, 1)).double(), expected, rtol=1e-3, atol=1e-6)
