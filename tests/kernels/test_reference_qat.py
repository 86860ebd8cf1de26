"""Fake quantization against its equations, number by number."""

import math

import pytest
import torch
from qzo_kernels.reference_qat import FLOOR, clipped_grid, fake_quantize, fake_quantize_rows


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("cols", "group_size"), [(24, 8), (20, 8), (7, -1), (5, 16)])
def test_weights_are_those_of_the_equation(bits, cols, group_size):
    torch.manual_seed(bits)
    size = cols if group_size == -1 else group_size
    groups = -(-cols // size)
    weight, low, high = torch.randn(3, cols), torch.randn(3, groups), torch.randn(3, groups)
    step, zero = clipped_grid(weight, bits, group_size, low, high)
    assert step.shape == zero.shape == (3, groups)
    before = weight.clone()
    result = fake_quantize(weight, step, zero, bits, group_size)
    assert torch.equal(weight, before)
    top = 2**bits - 1
    for n in range(3):
        for g in range(groups):
            row = weight[n, g * size : (g + 1) * size].tolist()
            least, most = sigmoid(low[n, g]) * min(0, *row), sigmoid(high[n, g]) * max(0, *row)
            delta = max((most - least) / top, FLOOR)
            z = round(-least / delta)
            assert 0 <= z <= top and zero[n, g] == z and math.isclose(step[n, g], delta, rel_tol=1e-5)
            for k, w in enumerate(row):
                code = min(max(round(w / delta) + z, 0), top)
                assert math.isclose(result[n, g * size + k], delta * (code - z), rel_tol=1e-4, abs_tol=1e-6)


def test_no_clipping_keeps_the_whole_range():
    weight = torch.randn(4, 32)
    whole = clipped_grid(weight, 4, 16)
    for bound in whole, clipped_grid(weight, 4, 16, *[torch.full((4, 2), math.inf)] * 2):
        assert torch.equal(bound[0], whole[0]) and torch.equal(bound[1], whole[1])
    error = (fake_quantize(weight, *whole, 4, 16) - weight).abs()
    assert bool((error <= whole[0].repeat_interleave(16, 1) * 1.0001).all())
    assert bool((clipped_grid(weight, 4, 16, *[torch.full((4, 2), 3.0)] * 2)[0] < 0.96 * whole[0]).all())


def test_a_group_of_zeros_or_of_one_sign():
    assert not fake_quantize(torch.zeros(2, 8), *clipped_grid(torch.zeros(2, 8), 4, 8), 4, 8).any()
    for sign in 1, -1:
        weight = sign * (torch.rand(1, 8) + 5)
        step, zero = clipped_grid(weight, 4, 8)
        assert zero.item() == (0 if sign > 0 else 15)
        assert float((fake_quantize(weight, step, zero, 4, 8) - weight).abs().max()) <= float(step) * 0.5001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rows_of_activations_are_those_of_the_equation(bits, dtype):
    torch.manual_seed(bits)
    x = (torch.randn(2, 5, 33) * torch.tensor([0.01, 1.0, 100.0, 1.0, 1.0])[:, None] + torch.tensor([0, 0, 0, 7.0, -7])[:, None]).to(dtype)
    result = fake_quantize_rows(x, bits)
    assert result.dtype == dtype
    for row, got in zip(x.flatten(0, 1).double(), result.flatten(0, 1).double(), strict=True):
        step = (row.max() - row.min()) / (2**bits - 1)
        rounding = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype] * row.abs().max()
        # z is rounded too: what is at an end of the range may be half a step beyond the last code.
        assert bool(((got - row).abs() <= step * 1.0001 + rounding).all())
        assert float((got - row).abs().mean()) < 0.37 * step + rounding
        assert len(got.unique()) <= 2**bits


def test_a_span_shrinks_each_side_towards_zero():
    x = torch.tensor([[-8.0, -1.0, 0.5, 16.0], [4.0, 5.0, 6.0, 8.0]])
    got = fake_quantize_rows(x, 4, torch.tensor([0.5]))
    assert float(got[0].min()) >= -4.8 and 7.2 <= float(got[0].max()) <= 8.8
    assert float((got[0, 1:3] - x[0, 1:3]).abs().max()) <= 0.41  # a step of 0.8
    torch.testing.assert_close(got[1], torch.full((4,), 4.0))
    assert torch.equal(fake_quantize_rows(x, 4, torch.ones(1)), fake_quantize_rows(x, 4))


def test_rows_without_a_range():
    assert torch.equal(fake_quantize_rows(torch.zeros(2, 4), 4), torch.zeros(2, 4))
    torch.testing.assert_close(fake_quantize_rows(torch.full((2, 4), -3.0), 4), torch.full((2, 4), -3.0))
    assert bool(fake_quantize_rows(torch.tensor([[1.0, math.nan], [1.0, math.inf]]), 4).isnan().any(1).all())
    x = torch.randn(3, 4)
    assert fake_quantize_rows(x, 16) is x
