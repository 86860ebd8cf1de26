"""The statistics of quantized noise: closed forms against the paper's equations on drawn noise. Bounds are 5 sigma, computed."""

import functools

import pytest
import torch
from qzo_kernels.pack import tile_codes, untile_codes
from qzo_kernels.reference_codes import CLIP, quantized_normal, rounded, update_codes_
from qzo_kernels.reference_noise import integer_normal, uniform24

from qzo.zo.quantized import _levels, agreement, gain, mean_move, sampled, signal_to_noise, unit, walk
from qzo.zo.targets import TensorInfo

SEED, UID, DIRECTIONS, DIMENSIONS = 17, 0xC0DE, 1024, 4096
# noise_bits: E[v^2], signal-to-noise of Q-RGE2, as simulated before the closed forms were written
SIMULATED = {8: (1.00, 1.0), 4: (1.05, 0.90), 3: (1.30, 0.60), 2: (3.19, 0.10)}
ALL_BITS = pytest.mark.parametrize("noise_bits", SIMULATED)
BOTH = pytest.mark.parametrize("estimator", ["rge1", "rge2"])


@functools.cache
def levels(noise_bits: int, stream: int, step: int = 0, direction: int = 0, uid: int = UID) -> torch.Tensor:
    """int8 u: a row is one direction of the linear loss."""
    return quantized_normal((DIRECTIONS, DIMENSIONS), SEED, step, direction, uid, stream, noise_bits)


def drawn(noise_bits: int, stream: int, **where: int) -> torch.Tensor:
    """f32 v, in standard deviations of z."""
    return levels(noise_bits, stream, **where).float() * (CLIP / ((1 << (noise_bits - 1)) - 1))


def near(values: torch.Tensor, expected: float) -> None:
    values = values.double().flatten()
    assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5


@ALL_BITS
def test_moments(noise_bits):
    v1, v2 = drawn(noise_bits, 1), drawn(noise_bits, 2)
    for v in (v1, v2):
        near(v**2, gain(noise_bits))
        near(v.abs(), mean_move(noise_bits))
    near(v1 * v2, agreement(noise_bits))
    near(v1 * v2 - 0.999 * v1 * v1, agreement(noise_bits) - 0.999 * gain(noise_bits))


@ALL_BITS
def test_simulated_figures(noise_bits):
    expected_gain, expected_ratio = SIMULATED[noise_bits]
    assert gain(noise_bits) == pytest.approx(expected_gain, abs=0.006)
    assert signal_to_noise(noise_bits, "rge2") == pytest.approx(expected_ratio, abs=0.006)
    assert signal_to_noise(noise_bits, "rge1") == 1
    assert 0.9998 < agreement(noise_bits) < 1


def chi_squared(errors: torch.Tensor, entry: torch.Tensor, fourth: torch.Tensor, second: torch.Tensor) -> None:
    """Sums of errors per table entry against their variance; second and fourth are the moments of one error, per entry."""
    count = torch.bincount(entry, minlength=65536)
    sums = torch.bincount(entry, errors, minlength=65536)
    use = (second > 1e-2 * second.max()) & (count > 0)
    ratio, excess = (sums**2 / (count * second))[use], ((fourth / second**2 - 3) / count)[use]
    assert use.sum() > 10_000
    assert abs(ratio.sum() - len(ratio)) < 5 * float((2 + excess).sum()) ** 0.5


@ALL_BITS
def test_roundings_given_z(noise_bits):
    """At every value of z alone: both roundings have its mean, and their errors are uncorrelated."""
    top = (1 << (noise_bits - 1)) - 1
    z = integer_normal((DIRECTIONS, DIMENSIONS), SEED, 0, 0, UID).flatten().long()
    mean = (torch.arange(-32768, 32768, dtype=torch.float64) * (top / 2**14)).clamp(-top, top)
    part = mean % 1
    second = part * (1 - part)
    fourth = second * (1 - 3 * second)
    errors = [levels(noise_bits, stream).flatten().double() - mean[z + 32768] for stream in (1, 2)]
    for error in errors:
        chi_squared(error, z + 32768, fourth, second)
    chi_squared(errors[0] * errors[1], z + 32768, fourth**2, second**2)


def check_block(a: torch.Tensor, b: torch.Tensor, diagonal: float, spread: float) -> None:
    """E[a bT] over rows of 64 elements is diagonal I; `spread` the standard deviation of a product off the diagonal."""
    a, b = a.reshape(-1, 64), b.reshape(-1, 64)
    block = (a.T @ b).double() / len(a)
    off = (block - diagonal * torch.eye(64, dtype=torch.float64)) * len(a) ** 0.5 / spread
    if diagonal:
        near((a * b), diagonal)
        off = off[~torch.eye(64, dtype=torch.bool)]
    assert off.abs().max() < 5
    assert abs((off**2).sum() - off.numel()) < 5 * (2 * off.numel()) ** 0.5


@ALL_BITS
def test_covariance_is_the_identity(noise_bits):
    """E[v1 v2T] = I but for the clip; of one rounding with itself, gain I."""
    v1, v2, g = drawn(noise_bits, 1), drawn(noise_bits, 2), gain(noise_bits)
    check_block(v1, v2, agreement(noise_bits), g)
    near(v1**2, g)
    left, right = v1.reshape(-1, 2, 64).unbind(1)
    check_block(left, right, 0, g)


@pytest.mark.parametrize("where", [{"step": 1}, {"direction": 1}, {"uid": UID + 1}], ids=lambda where: next(iter(where)))
def test_other_blocks_are_zero(where):
    for stream in (1, 2):
        check_block(drawn(4, 1), drawn(4, stream, **where), 0, gain(4))


@BOTH
@ALL_BITS
def test_estimates_of_a_linear_loss(noise_bits, estimator):
    """l = g.w in 4096 dimensions, 1,024 directions, 64 orthonormal g: mean of the estimate, and its signal-to-noise."""
    v1, v2 = drawn(noise_bits, 1), drawn(noise_bits, 1 if estimator == "rge1" else 2)
    g = torch.linalg.qr(torch.randn(DIMENSIONS, 64, generator=torch.Generator().manual_seed(3))).Q
    mu, along = v1 @ g, v2 @ g
    top = (1 << (noise_bits - 1)) - 1
    scale = unit(noise_bits, estimator) * top / CLIP
    mean = (mu * along).double().mean(1) * scale
    power = (mu**2).double().mean(1) * (v2**2).double().mean(1) * scale**2
    near(mean, 1 if estimator == "rge1" else agreement(noise_bits))
    components = (mu.T @ along).double() / DIRECTIONS * scale
    sigma = ((mu**2).T @ (along**2)).double().sqrt() / DIRECTIONS * scale
    off = (components / sigma)[~torch.eye(64, dtype=torch.bool)]
    assert off.abs().max() < 5 and abs(off.mean()) < 5 / off.numel() ** 0.5
    measured = float(mean.mean() ** 2 / power.mean())
    relative = 2 * mean / mean.mean() - power / power.mean()
    expected = signal_to_noise(noise_bits, estimator)
    assert abs(measured / expected - 1) < 5 * float(relative.std()) / DIRECTIONS**0.5
    assert float(relative.std()) / DIRECTIONS**0.5 < 0.03


@ALL_BITS
@pytest.mark.parametrize("rate", [1e-3, 0.1, -0.7, 3.3])
def test_walk_of_one_rounding(noise_bits, rate):
    """The squared error of a rounding, whatever its size."""
    x = drawn(noise_bits, 2)[:128] * rate
    uniform = uniform24(tuple(x.shape), SEED, 5, 0, UID, 3)
    near((rounded(x, uniform, 2.0**15) - x.double()) ** 2, walk(rate, 1, noise_bits) ** 2)


@ALL_BITS
def test_walk_of_small_steps(noise_bits):
    """Below one grid step a code moves by 0 or 1: its whole variance is the mean move."""
    for rate in (1e-4, -0.03, 0.25):
        whole = 700 * abs(rate) * mean_move(noise_bits)
        assert walk(rate, 700, noise_bits) ** 2 + 700 * rate**2 * gain(noise_bits) == pytest.approx(whole, rel=1e-9)
    assert walk(0.3, 900, noise_bits) == pytest.approx(30 * walk(0.3, 1, noise_bits))


@BOTH
def test_units_descend_a_linear_loss(estimator):
    """Codes move by -lr g a step: coefs are lr mu in units of `unit`, in grid steps. 2 bits: a gain of 3.19."""
    rows, cols, steps, lr, noise_bits = 32, 64, 400, 0.2, 2
    stream = 1 if estimator == "rge1" else 2
    g = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4)) / (rows * cols) ** 0.5
    level = unit(noise_bits, "rge2")
    mu = torch.stack([(g * level * quantized_normal((rows, cols), 9, s, 0, UID, 1, noise_bits)).sum() for s in range(steps)])
    coefs = (lr * unit(noise_bits, estimator) * mu)[:, None]
    codes, residual = tile_codes(torch.full((rows, cols), 128, dtype=torch.uint8), 8), torch.zeros(rows, cols, dtype=torch.int16)
    update_codes_(codes, residual, torch.tensor([9, 0]), coefs, UID, 8, cols, noise_bits, stream)
    moved = untile_codes(codes, 8, cols).double() - 128 + residual.double() / 65536
    slope = float(-(moved * g).sum() / (lr * steps * (g**2).sum()))
    # Of one direction: mu (v2.g) / |g|^2, both normal with variance gain, correlated by 1 or agreement / gain.
    own = 2.0 if estimator == "rge1" else gain(noise_bits) ** 2 + agreement(noise_bits) ** 2
    assert abs(slope - 1) < 5 * (own / steps) ** 0.5


@pytest.mark.parametrize("noise_bits", [1, 9, 4.5])
def test_other_noise_bits_are_refused(noise_bits):
    for function in (gain, agreement, mean_move):
        with pytest.raises(ValueError, match="noise_bits = .*: expected 2 to 8"):
            function(noise_bits)


def test_other_estimators_are_refused():
    for function in (unit, signal_to_noise):
        with pytest.raises(ValueError, match="'rge3'; expected rge1"):
            function(4, "rge3")


@ALL_BITS
def test_sampled_noise_has_the_moments_of_the_closed_forms(noise_bits):
    """Within 5 standard deviations of a mean over a million elements; another step draws other noise."""
    info, sure = TensorInfo("t/codes", 77, (4096, 300), float("-inf")), 5 / 1e3
    found = sampled(info, torch.tensor([3, 5]), noise_bits)
    _, chances = _levels(noise_bits)
    assert abs(found["mean"]) < sure * gain(noise_bits) ** 0.5 and abs(found["at_the_clip"] - chances[[0, -1]].sum()) < sure
    # v is at most 4 in size.
    most = sure * 4 * gain(noise_bits) ** 0.5
    assert abs(found["mean_square"] - gain(noise_bits)) < most and abs(found["agreement"] - agreement(noise_bits)) < most
    assert found != sampled(info, torch.tensor([3, 6]), noise_bits)
