"""Latent weights under noise and their updates: the reference against its equations, number by number, and what the operators refuse."""

import pytest
import torch
from qzo_kernels import ops_qat
from qzo_kernels.ops_qat import LatentNoise, Realized
from qzo_kernels.reference_noise import gaussian, rademacher
from qzo_kernels.reference_qat import clipped_grid, fake_quantize

UID, SEED = 12345, 9


def made(rows: int = 6, cols: int = 20, bits: int = 4, group_size: int = 8):
    torch.manual_seed(0)
    weight, s_in, s_out = torch.randn(rows, cols), torch.rand(cols) + 0.5, torch.rand(rows) + 0.5
    step, zero = clipped_grid(weight * s_in / s_out[:, None], bits, group_size)
    return weight, s_in, s_out, step, zero


def states(*directions: int, step: int = 0) -> torch.Tensor:
    return torch.tensor([[SEED, step, d] for d in directions])


@pytest.mark.parametrize("group_size", [8, 5, 20, 64, -1])
@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_forward_is_the_equation(draw, group_size):
    weight, s_in, s_out, step, zero = made(group_size=group_size)
    rows, cols, eps = step * s_out[:, None], 1 / s_in, torch.tensor([0.4, -0.4, 0.1])
    noise = LatentNoise(states(0, 0, 3), eps, UID, rows, cols, draw is gaussian)
    seen = ops_qat.effective_weight(weight, step, zero, 4, group_size, torch.float32, s_in, s_out, noise)
    size = 20 if group_size == -1 else group_size
    unit = rows[:, torch.arange(20) // size] * cols
    for got, e, direction in zip(seen, eps, (0, 0, 3), strict=True):
        moved = weight + e * (unit * draw((6, 20), SEED, 0, direction, UID))
        assert torch.equal(got, fake_quantize(moved * s_in / s_out[:, None], step, zero, 4, group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_noise_and_at_eps_0_the_weight_itself_is_seen(dtype):
    weight, s_in, s_out, step, zero = made()
    alone = ops_qat.effective_weight(weight, step, zero, 4, 8, dtype, s_in, s_out)
    assert alone.shape == (1, 6, 20) and alone.dtype == dtype
    assert torch.equal(alone[0], fake_quantize(weight * s_in / s_out[:, None], step, zero, 4, 8).to(dtype))
    noise = LatentNoise(states(0, 0), torch.tensor([0.0, -0.0]), UID, step, None, False)
    both = ops_qat.effective_weight(weight, step, zero, 4, 8, dtype, s_in, s_out, noise)
    assert torch.equal(both[0].view(torch.uint8), both[1].view(torch.uint8)) and torch.equal(both[0], alone[0])


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_update_along_the_noise(draw):
    weight, s_in, s_out, step, zero = made()
    coefs, unit = torch.tensor([[0.1, -0.2], [0.3, 0.0]]), step[:, torch.arange(20) // 8] * (1 / s_in)
    expected = weight.clone()
    for s, row in enumerate(coefs):
        total = torch.zeros_like(weight)
        for d, c in enumerate(row):
            total += (unit * draw((6, 20), SEED, 4 + s, d, UID)) * c
        expected -= total
    at, is_gaussian = torch.tensor([SEED, 4]), draw is gaussian
    moved = weight.clone()
    ops_qat.update_latent_(moved, at, coefs, UID, 8, step, 1 / s_in, is_gaussian)
    assert torch.equal(moved, expected)
    one = weight.clone()
    for s in range(2):
        ops_qat.update_latent_(one, at + torch.tensor([0, s]), coefs[s : s + 1], UID, 8, step, 1 / s_in, is_gaussian)
    assert torch.equal(one, expected)
    ops_qat.update_latent_(one, at, torch.zeros(3, 2), UID, 8, step, 1 / s_in, is_gaussian)
    assert torch.equal(one, expected)


def test_update_along_the_realized_difference():
    """What moved a code moves its weight, by whole steps over 2 eps; the others stay, to the bit."""
    weight, s_in, s_out, step, zero = made()
    rows, cols, eps, c = step * s_out[:, None], 1 / s_in, 0.3, 0.05
    noise = LatentNoise(states(0, 0, step=4), torch.tensor([eps, -eps]), UID, rows, cols, False)
    plus, minus = ops_qat.effective_weight(weight, step, zero, 4, 8, torch.float32, s_in, s_out, noise)
    moved = weight.clone()
    ops_qat.update_latent_(moved, torch.tensor([SEED, 4]), torch.tensor([[c]]), UID, 8, rows, cols, False, Realized(step, zero, 4, s_in, s_out, eps))
    groups = torch.arange(20) // 8
    r = ((plus - minus) / step[:, groups]).round() / (2 * eps)
    assert 0.2 < float((r != 0).float().mean()) < 0.9
    torch.testing.assert_close(moved, weight - c * rows[:, groups] * cols * r)
    assert torch.equal(moved[r == 0], weight[r == 0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "bits = 5"), ({"group_size": 0}, "group_size = 0"), ({"dtype": torch.int8}, "dtype: torch.int8"),
        ({"step": torch.ones(6, 2)}, "step: .*shape \\(6, 2\\)"), ({"s_in": torch.ones(6)}, "s_in"),
        ({"weight": torch.ones(6, 20).half(), "noise": True}, "weight: torch.float16"), ({"rows": torch.ones(6, 1), "noise": True}, "rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, match):
    weight, s_in, s_out, step, zero = made()
    given = {"weight": weight, "step": step, "zero": zero, "bits": 4, "group_size": 8, "dtype": torch.float32, "s_in": s_in, "s_out": s_out}
    given |= change
    rows = given.pop("rows", None)
    if given.pop("noise", None):
        given["noise"] = LatentNoise(states(0), torch.ones(1), UID, rows, None, False)
    with pytest.raises(ValueError, match=match):
        ops_qat.effective_weight(**given)


def test_the_realized_difference_is_of_one_direction():
    weight, _, _, step, zero = made()
    with pytest.raises(ValueError, match="2 directions"):
        ops_qat.update_latent_(weight, torch.tensor([0, 0]), torch.zeros(1, 2), UID, 8, step, None, False, Realized(step, zero, 4, None, None, 0.1))
