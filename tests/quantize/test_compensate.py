"""Latents that round as GPTQ rounds: their codes, the grid that they leave as it is, and what is gained."""

import pytest
import torch
from qzo_kernels.reference_qat import grid_codes
from torch import nn

from qzo.model.gptq_format import GptqConfig
from qzo.model.qat import FakeQuantLinear, Precision
from qzo.model.smoothing import Channels, Site
from qzo.quantize.compensate import MARGIN, compensated
from qzo.quantize.gptq import quantize_weight


def made(bits, size, smoothed, logit):
    torch.manual_seed(bits + size)
    linear = nn.Linear(96, 40, bias=False)
    inputs = torch.randn(512, 96) @ torch.randn(96, 96)
    sites = [Site(n, False, torch.device("cpu")) for n in (96, 40)] if smoothed else []
    for site in sites:
        site.scale.data.uniform_(0.5, 2)
    channels = [Channels(site) for site in sites] or [None, None]
    fake = FakeQuantLinear(linear, Precision(bits, size, 16), *channels, own=False)
    fake.low.data.fill_(logit)
    fake.high.data.fill_(logit)
    fake.refresh()
    return fake, inputs if not sites else inputs / sites[0].scale


@pytest.mark.parametrize("logit", [1.5, float("inf")])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 40), (4, -1)])
def test_codes_are_gptqs_and_the_grid_stays(bits, size, smoothed, logit):
    fake, inputs = made(bits, size, smoothed, logit)
    step, zero, hessian = fake.step.clone(), fake.zero.clone(), inputs.t() @ inputs
    before, wanted = fake.effective_weight(torch.float32)[0], fake.smoothed()
    codes = quantize_weight(wanted, GptqConfig(bits, size, sym=False), hessian, (step, zero)).codes.float()
    fake.weight.data = compensated(fake, hessian)
    moved = ((fake.smoothed() - wanted).abs() / step.repeat_interleave(96 if size == -1 else size, 1)[:, :96]).max()
    fake.refresh()
    assert torch.allclose(fake.step, step, rtol=1e-5, atol=0) and torch.equal(fake.zero, zero)
    # All but the ends of each group, which hold the grid.
    differ = (grid_codes(fake.smoothed(), fake.step, fake.zero, bits, size) != codes).float().mean()
    assert differ < (0.1 if logit == float("inf") else 0.03) and moved > MARGIN

    def lost(weight):
        return (inputs @ (weight - wanted).t()).square().mean()

    assert lost(fake.effective_weight(torch.float32)[0]) < 0.9 * lost(before)
