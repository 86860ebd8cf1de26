"""Updates of codes by the reference: exact fractions, the statistics of both roundings, drift over many steps."""

import functools
from fractions import Fraction

import pytest
import torch

from qzo_kernels import reference, reference_codes
from qzo_kernels.pack import tile_codes, untile_codes
from qzo_kernels.reference_codes import CLIP, quantized_normal, rounded, update_codes_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, STEP, UID = -3 << 40 | 5, 70000, 0x9ABCDEF1
GAINS = {8: 1.00, 4: 1.05, 3: 1.30, 2: 3.19}  # E[q²] at noise_bits, two decimals
EITHER = pytest.mark.parametrize("fed_back", [False, True], ids=["plain", "residual"])


def state(*fields: int) -> torch.Tensor:
    return torch.tensor(fields, dtype=torch.int64, device=DEVICE)


def middle(rows: int, cols: int, fed_back: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of 8 bits, all 128, far from both edges, and a residual of 0."""
    codes = tile_codes(torch.full((rows, cols), 128, dtype=torch.uint8), 8).to(DEVICE)
    return codes, torch.zeros(rows, cols, dtype=torch.int16, device=DEVICE) if fed_back else None


def moved(codes: torch.Tensor, residual: torch.Tensor | None, cols: int) -> torch.Tensor:
    """f64: how far the positions of `middle` have moved, in grid steps."""
    distance = untile_codes(codes, 8, cols).double() - 128
    return distance if residual is None else distance + residual.double() / 65536


@EITHER
@pytest.mark.parametrize("stream", [1, 2])
def test_reference_is_the_equation(fed_back, stream):
    """In fractions from the noise itself: the products and their sum are the only roundings."""
    bits, shape, coefs = 3, (5, 17), [[0.3, -1.7], [0.0, 0.01]]
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 8, shape, generator=generator, dtype=torch.uint8)
    residual = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16).to(DEVICE) if fed_back else None
    codes, q = tile_codes(q, bits).to(DEVICE), q.flatten().tolist()
    e = [Fraction(x, 65536) for x in residual.flatten().tolist()] if fed_back else []
    c = torch.tensor(coefs, device=DEVICE)
    update_codes_(codes, residual, state(SEED, STEP), c, UID, bits, 17, 4, stream)

    def nearby(x: Fraction, uniform: int) -> int:
        whole, part = divmod(abs(x), 1)
        return (1 if x > 0 else -1) * (int(whole) + (uniform < int(part * 2**24)))

    for s in range(2):
        u = [quantized_normal(shape, SEED, STEP + s, i, UID, stream, 4, DEVICE).flatten() for i in range(2)]
        draws = [reference.uniform24(shape, SEED, STEP + s, i, UID, 3, DEVICE).flatten().tolist() for i in range(2)]
        products = [(c[s, i] * u[i]).tolist() for i in range(2)]
        total = (c[s, 0] * u[0] + c[s, 1] * u[1]).tolist()
        for k in range(len(q)):
            if fed_back:
                at = q[k] + e[k] - Fraction(nearby(Fraction(total[k]) * 65536, draws[0][k]), 65536)
                at = min(max(at, Fraction(-1, 2)), 7 + Fraction(32767, 65536))
                q[k] = (at + Fraction(1, 2)) // 1
                e[k] = at - q[k]
            else:
                q[k] = min(max(q[k] - sum(nearby(Fraction(products[i][k]), draws[i][k]) for i in range(2)), 0), 7)
    assert untile_codes(codes, bits, 17).flatten().tolist() == q
    assert not fed_back or residual.flatten().tolist() == [x * 65536 for x in e]


@pytest.mark.parametrize("noise_bits", GAINS)
def test_quantized_normal_statistics(noise_bits):
    """E[q | z] = z at every z, both roundings independent, E[q1 q2] = 1 and E[q²] the closed form, within 5 sigma."""
    top, shape = (1 << (noise_bits - 1)) - 1, (512, 1000)
    q = [quantized_normal(shape, 11, 3, 0, 99, stream, noise_bits, DEVICE).double() * (CLIP / top) for stream in (1, 2)]
    z = (reference.integer_normal(shape, 11, 3, 0, 99, DEVICE).double() / 4096).clamp(-CLIP, CLIP)

    def near(values: torch.Tensor, expected: float) -> None:
        assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5 + 1e-12

    for low, high in zip([-9, -2, -1, -0.3, 0, 0.3, 1, 2], [-2, -1, -0.3, 0, 0.3, 1, 2, 9], strict=True):
        inside = (z >= low) & (z < high)
        near((q[0] - z)[inside], 0)
        near((q[1] - z)[inside], 0)
        near(((q[0] - z) * (q[1] - z))[inside], 0)
    n = reference.normal_table().double() * top / 2**14
    n = n.clamp(-top, top)
    part = n - n.floor()
    gain = float(((CLIP / top) ** 2 * (n**2 + part * (1 - part))).mean())
    assert gain == pytest.approx(GAINS[noise_bits], abs=0.006)
    near((q[0] ** 2).flatten(), gain)
    near((q[0] * q[1]).flatten(), 1)


def test_rounding_is_unbiased():
    """10⁷ draws within 5 sigma, down to a probability of 1e-4, where that is one sixth of the chance."""
    uniform = reference.uniform24((2500, 4000), 7, 1, 0, 42, 3, DEVICE)
    count = uniform.numel()
    for x in (1e-4, -1e-4, 3e-3, 0.37, -2.9999, 1000.25):
        exact = float(torch.tensor(x))
        part = abs(exact) % 1
        mean = rounded(torch.tensor(x, device=DEVICE), uniform, 2.0**15).sum(dtype=torch.int64).item() / count
        assert abs(mean - exact) < 5 * (part * (1 - part) / count) ** 0.5


@pytest.mark.parametrize("fed_back,size", [(False, 1e-3), (False, 0.03), (False, 0.4), (False, 1.7), (True, 1e-6), (True, 1e-3), (True, 0.4)])
def test_a_step_is_unbiased(fed_back, size):
    """E of the move is −c·u: along the noise and across it, within 5 sigma."""
    rows, cols, unit = 300, 1000, 2.0**-16 if fed_back else 1.0
    codes, residual = middle(rows, cols, fed_back)
    c = torch.tensor([[size]], device=DEVICE)
    update_codes_(codes, residual, state(SEED, STEP), c, UID, 8, cols, 4, 2)
    u = quantized_normal((rows, cols), SEED, STEP, 0, UID, 2, 4, DEVICE)
    wanted = (c[0, 0] * u).double()
    error, part = moved(codes, residual, cols) + wanted, (wanted / unit) % 1
    sigma = unit * float((part * (1 - part)).sum()) ** 0.5
    assert sigma > 0
    assert abs(error.sum()) < 5 * sigma and abs((error * u.sign()).sum()) < 5 * sigma


@pytest.fixture(scope="module")
def kept():
    """The quantized normals of 5,000 steps, drawn once for all that asks for them."""
    return functools.cache(quantized_normal)


@EITHER
def test_drift_over_many_steps(monkeypatch, kept, fed_back):
    """5,000 steps of a small constant coefficient. With a residual, positions follow the intended displacement within 1 %
    and codes to half a grid step; without, codes walk at random around it, with the variance of 5,000 roundings."""
    rows, cols, steps = 8, 128, 5000
    c = torch.full((steps, 1), 0.01, device=DEVICE)
    codes, residual = middle(rows, cols, fed_back)
    monkeypatch.setattr(reference_codes, "quantized_normal", kept)
    update_codes_(codes, residual, state(SEED, STEP), c, UID, 8, cols, 4, 2)
    wanted = torch.zeros(rows, cols, dtype=torch.float64, device=DEVICE)
    variance = torch.zeros_like(wanted)
    for s in range(steps):
        g = (c[0, 0] * kept((rows, cols), SEED, STEP + s, 0, UID, 2, 4, codes.device)).double()
        wanted -= g
        variance += g.abs() * (1 - g.abs())
    error = moved(codes, residual, cols) - wanted
    if fed_back:
        assert error.norm() < 0.01 * wanted.norm()
        assert (untile_codes(codes, 8, cols) - 128 - wanted).abs().max() < 0.51
    else:
        assert abs(float((error**2 / variance).mean()) - 1) < 5 * (2 / error.numel()) ** 0.5
        assert error.norm() > 3 * wanted.norm()
