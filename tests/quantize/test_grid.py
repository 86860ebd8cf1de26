"""The grid: scales that fp16 holds, zeros that every reader agrees on, all weights within half a step."""

import pytest
import torch

from qzo.model.gptq_format import GptqConfig
from qzo.quantize import rtn
from qzo.quantize.grid import fit_grid, round_to_grid

KINDS = [(bits, sym, version) for bits in (2, 3, 4, 8) for sym in (True, False) for version in ("gptq", "gptq_v2")]
WEIGHTS = {
    "normal": lambda: torch.randn(50, 37),
    "positive": lambda: torch.rand(50, 37) + 0.5,
    "negative": lambda: -torch.rand(50, 37) - 0.5,
    "barely negative": lambda: torch.rand(50, 37) - 0.02,
    "tiny": lambda: 1e-6 * torch.randn(50, 37),
    "zero": lambda: torch.zeros(50, 37),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("bits", "sym", "version"), KINDS)
def test_min_max_covers_the_range(bits, sym, version, kind):
    torch.manual_seed(0)
    weight = WEIGHTS[kind]()
    scale, zero = fit_grid(weight, GptqConfig(bits, 37, sym, version=version))
    assert torch.equal(scale, scale.half().float()) and bool((scale > 0).all())
    assert bool((zero >= (0 if version == "gptq_v2" else 1)).all()) and bool((zero <= 2**bits - 1).all())
    codes = round_to_grid(weight, scale, zero, bits)
    assert bool((codes >= 0).all()) and bool((codes <= 2**bits - 1).all())
    error = ((codes - zero) * scale - weight).abs()
    # A symmetric grid has one step less above zero than below. What fp16 takes from the scale adds up over the codes.
    rounded = torch.maximum(scale * 2**-11, torch.tensor(2.0**-25)) * 2**bits
    assert bool((error <= (1.0 if sym else 0.5) * scale + rounded).all())


@pytest.mark.parametrize(("bits", "sym", "version"), KINDS)
def test_search_never_does_worse_and_weighs_columns(bits, sym, version):
    torch.manual_seed(1)
    weight, config = torch.randn(40, 64) ** 3, GptqConfig(bits, 64, sym, version=version)
    importance = torch.rand(64) ** 4

    def loss(scale, zero, weights):
        return (((round_to_grid(weight, scale, zero, bits) - zero) * scale - weight) ** 2 * weights).sum(1)

    plain, searched, weighed = (
        fit_grid(weight, config), fit_grid(weight, config, torch.ones(64)), fit_grid(weight, config, importance)
    )  # fmt: skip
    ones = torch.ones(64)
    assert bool((loss(*searched, ones) <= loss(*plain, ones)).all())
    assert bool((loss(*weighed, importance) <= loss(*plain, importance)).all())
    assert loss(*weighed, importance).sum() < loss(*searched, importance).sum()


@pytest.mark.parametrize("size", [-1, 32, 40])
@pytest.mark.parametrize(("bits", "sym", "version"), KINDS)
def test_rtn_picks_the_nearest_point_of_each_group(bits, sym, version, size):
    torch.manual_seed(2)
    weight = torch.randn(24, 96)
    weight[:, :32] = 0
    result = rtn.quantize_weight(weight, GptqConfig(bits, size, sym, version=version))
    width = 96 if size == -1 else size
    assert result.scales.shape == result.zeros.shape == (24, -(-96 // width))
    assert torch.equal(result.g_idx, (torch.arange(96) // width).int())
    for col in range(96):
        scale, zero = result.scales[:, col // width], result.zeros[:, col // width].float()
        points = (torch.arange(2**bits)[:, None] - zero) * scale
        nearest = (points - weight[:, col]).abs().amin(0)
        assert torch.allclose((result.dequantize()[:, col] - weight[:, col]).abs(), nearest, atol=1e-5)
