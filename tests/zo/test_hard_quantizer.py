"""How much of a direction passes a hard quantizer: ZeroQAT's difference L(Q(W + εu)) - L(Q(W - εu)) against ε over the grid's step D.

r = [Q(W + εu) - Q(W - εu)] / 2ε is what the loss sees of u, with (D, z) frozen. To first order d = g·r, and the estimate is d v with v = u,
or v = r: the realized difference. Over the gradients g of N independent elements, in units of the estimate without a quantizer (1/N),

    signal-to-noise = N |E ĝ|² / E|ĝ|² = (E[r·v])² / E[|r|²|v|²]

For normal u and weights anywhere between grid points r·2ε/D is a whole number n with mean x = 2ε|u|/D, floor(x) or one more, and E[ru] = 1:

    signal-to-noise along u = 1 / E[(n D / 2ε)²]  ->  2.5 ε/D for small ε
"""

import pytest
import torch
from qzo_kernels.reference_qat import clipped_grid, fake_quantize

GROUP, GROUPS, DIRECTIONS = 128, 16, 400
# ε/D: as published for this project, to the digits given
TABLE = {0.01: 0.02, 0.1: 0.25, 0.3: 0.7}


def closed_form(ratio: float) -> float:
    u = torch.arange(-8, 8, 1e-4, dtype=torch.float64)
    x = 2 * ratio * u.abs()
    low, part = x.floor(), x % 1
    squares = low**2 + (2 * low + 1) * part
    return 1 / float((squares * torch.exp(-(u**2) / 2)).sum() * 1e-4 / (2 * torch.pi) ** 0.5 / (2 * ratio) ** 2)


def measured(bits: int, ratio: float) -> tuple[float, float]:
    """Signal-to-noise along u and along r, for normal weights on the grid that clipping begins with."""
    torch.manual_seed(bits)
    weight = torch.randn(GROUPS, GROUP)
    logits = torch.full((GROUPS, 1), 3.0)
    step, zero = clipped_grid(weight, bits, GROUP, logits, logits)
    eps = ratio * step
    dots, powers = [], []
    for _ in range(DIRECTIONS):
        u = torch.randn_like(weight)
        plus, minus = (fake_quantize(weight + sign * eps * u, step, zero, bits, GROUP) for sign in (1, -1))
        r = (plus - minus) / (2 * eps)
        pair = torch.stack((u, r)).flatten(1).double()
        dots.append(pair @ pair[1])
        powers.append(pair[1].square().sum() * pair.square().sum(1))
    return tuple((torch.stack(dots).mean(0) ** 2 / torch.stack(powers).mean(0)).tolist())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("ratio", TABLE)
def test_signal_through_the_quantizer(ratio, bits):
    along_noise, along_difference = measured(bits, ratio)
    assert along_noise == pytest.approx(closed_form(ratio), rel=0.2)
    assert closed_form(ratio) == pytest.approx(TABLE[ratio], rel=0.2, abs=0.0051)  # the last digit of the table
    assert along_difference == pytest.approx(0.95, abs=0.051)


def test_small_noise_and_large():
    assert closed_form(1e-3) == pytest.approx(2.5e-3, rel=0.01) and closed_form(10) > 0.99


def test_the_pair_sees_one_grid():
    """With a grid of its own for each sign, weights move that no noise reached."""
    torch.manual_seed(0)
    weight, moved = torch.randn(1, GROUP), torch.zeros(1, GROUP)
    moved[0, weight.argmax()] = 0.2
    frozen = clipped_grid(weight, 4, GROUP)
    both = [fake_quantize(weight + sign * moved, *frozen, 4, GROUP) for sign in (1, -1)]
    own = [fake_quantize(w, *clipped_grid(w, 4, GROUP), 4, GROUP) for w in (weight + moved, weight - moved)]
    assert int((both[0] != both[1]).sum()) <= 1 and int((own[0] != own[1]).sum()) > 100
