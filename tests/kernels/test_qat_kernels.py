"""Latent weights under noise and their updates: the Triton launchers against the reference, and the operators."""

import itertools

import pytest
import torch

from qzo_kernels import ops_qat
from qzo_kernels.reference_qat import LatentNoise, Realized, clipped_grid, effective_weight, update_latent_

pytest.importorskip("triton")
from qzo_kernels import qat as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED, STEP, UID = -3 << 40 | 5, 70000, 0x9ABCDEF1
SHAPES = [(1, 1), (3, 17), (7, 257), (5, 128), (2, 300), (17, 172)]
GROUPS = [-1, 32, 128, 1000, 48]
BITS = ops_qat.BITS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EITHER = [False, True]
GIVEN = list(itertools.product(EITHER, repeat=4))  # rows, cols, s_in, s_out


def made(rows: int, cols: int, bits: int, group_size: int, given: tuple[bool, ...]) -> tuple:
    """(weight, step, zero, rows, cols, s_in, s_out): a grid that cuts a part of the weights off, zeros in the first row."""
    generator = torch.Generator().manual_seed(rows + 1000 * cols + bits)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(DEVICE)

    weight = torch.randn(rows, cols, generator=generator).to(DEVICE)
    weight[0] = 0
    step, zero = clipped_grid(weight * 0.8, bits, group_size)
    unit = (step * uniform(*step.shape), uniform(cols))
    return weight, step, zero, *(x if there else None for x, there in zip((*unit, uniform(cols), uniform(rows)), given, strict=True))


def latent_noise(variants: int, rows, cols, gaussian: bool) -> LatentNoise:
    """Both signs of a direction, then another direction, step and seed."""
    states = torch.tensor([[SEED + v // 4, STEP + v // 3, v // 2 - v // 4] for v in range(variants)], device=DEVICE)
    eps = torch.tensor([0.4 * (-1) ** v + 0.1 * (v // 2) for v in range(variants)], device=DEVICE)
    return LatentNoise(states, eps, UID, rows, cols, gaussian)


def case(i: int) -> tuple:
    """Number i of a walk over shapes, bits and groups."""
    return *SHAPES[i % 6], BITS[i % 5], GROUPS[(i + i // 5) % 5]


def assert_on_grid(ours: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """The same numbers; where the noise's last bits may differ, nearly all of them."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    # Triton's interpreter cuts bf16 off where a device rounds.
    cut = ours.dtype == torch.bfloat16 and DEVICE == "cpu"
    same = torch.isclose(ours, expected, rtol=2**-7, atol=0) if cut else ours == expected
    assert bool(same.all()) if exact else float(same.float().mean()) > 0.99


@pytest.mark.parametrize("i,gaussian", [*((i, False) for i in range(24)), *((i, True) for i in range(8))])
def test_forward_equals_the_reference(poison, i, gaussian):
    """Bit for bit, whatever is not given, for one to five variants in every dtype."""
    rows, cols, bits, group_size = case(i)
    weight, step, zero, *units, s_in, s_out = made(rows, cols, bits, group_size, GIVEN[(i + 8 * gaussian) % 16])
    before, noise = weight.clone(), latent_noise(1 + i % 5, *units, gaussian)
    tail = (step, zero, bits, group_size, DTYPES[i % 3], s_in, s_out, noise)
    ours, expected = kernels.launch_effective_weight(weight, *tail), effective_weight(weight, *tail)
    assert_on_grid(ours, expected, exact=not gaussian)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("i", range(6))
def test_forward_without_noise(poison, i, dtype):
    """Of latents of every dtype, in every dtype."""
    rows, cols, bits, group_size = case(i)
    weight, step, zero, _, _, s_in, s_out = made(rows, cols, bits, group_size, (False, False, i % 2 == 0, i % 3 == 0))
    weight = weight.to(DTYPES[(i + 1) % 3])
    tail = (step, zero, bits, group_size, dtype, s_in, s_out)
    assert_on_grid(kernels.launch_effective_weight(weight, *tail), effective_weight(weight, *tail), exact=True)


@pytest.mark.parametrize("size,warps", kernels._TILES.values())
def test_every_tile(poison, monkeypatch, size, warps):
    monkeypatch.setattr(kernels, "_TILES", {0: (size, warps)})
    weight, step, zero, *units, s_in, s_out = made(7, 300, 4, 32, (True,) * 4)
    tail = (step, zero, 4, 32, torch.float32, s_in, s_out, latent_noise(3, *units, False))
    assert_on_grid(kernels.launch_effective_weight(weight, *tail), effective_weight(weight, *tail), exact=True)
    ours, expected, coefs = weight.clone(), weight.clone(), torch.tensor([[0.3, -0.1]], device=DEVICE)
    at = torch.tensor([SEED, STEP], device=DEVICE)
    kernels.launch_update_latent(ours, at, coefs, UID, 32, *units, False)
    update_latent_(expected, at, coefs, UID, 32, *units, False)
    assert torch.equal(ours, expected)


def test_sizes_choose_tiles():
    """Hundreds of programs for a small weight, large tiles for a large one."""
    small, large = (kernels._geometry(torch.empty(*shape, device="meta"), 128) for shape in ((512, 512), (5120, 5120)))
    assert small[0] == 512 and small[1]["ROWS"] == 4 and large[0] == 25600 and large[1]["ROWS"] == 8
    assert kernels._geometry(torch.empty(3, 5, device="meta"), -1)[1]["WIDTH"] == 8


@pytest.mark.parametrize("smoothed", EITHER)
def test_quotients_at_and_next_to_ties(smoothed):
    """Weights at the middle between two codes, and up to two last bits from it, on 128 grids: the code that IEEE division gives."""
    generator = torch.Generator().manual_seed(5)
    count = 1 << (15 if DEVICE == "cuda" else 8)
    step = (torch.rand(128, 1, generator=generator) * 4 - 20).exp2().to(DEVICE)
    s_out = (torch.rand(128, generator=generator) * 4 - 2).exp2().to(DEVICE) if smoothed else None
    weight = (torch.randint(-9, 10, (128, count), generator=generator).to(DEVICE) + 0.5) * step
    weight = weight if s_out is None else weight * s_out[:, None]
    bits = torch.randint(-2, 3, weight.shape, generator=generator, dtype=torch.int32).to(DEVICE)
    weight = (weight.view(torch.int32) + bits).view(torch.float32)
    tail = (step, torch.full_like(step, 8), 4, -1, torch.float32, None, s_out)
    assert torch.equal(kernels.launch_effective_weight(weight, *tail), effective_weight(weight, *tail))


def test_ties_far_values_and_broken_numbers():
    """Halves go to even, a weight far beyond the grid ends at its edge, a NaN stays one."""
    inf = float("inf")
    weight = torch.tensor([[0.5, 1.5, -2.5, 3.5, 1e30, -1e30, 8388609.0, float("nan"), -0.0, inf, -inf]], device=DEVICE)
    step, zero = torch.ones(1, 1, device=DEVICE), torch.full((1, 1), 8.0, device=DEVICE)
    seen = kernels.launch_effective_weight(weight, step, zero, 4, -1, torch.float32)[0, 0]
    assert seen[:7].tolist() == [0, 2, -2, 4, 7, -8, 7] and bool(seen[7].isnan()) and seen[8:].tolist() == [0, 7, -8]


# steps, directions
UPDATES = [(1, 1), (1, 3), (3, 1), (2, 2)]


def coefs_of(steps: int, directions: int, size: float = 0.5) -> torch.Tensor:
    made = size * (torch.rand(steps, directions, generator=torch.Generator().manual_seed(steps + directions)) - 0.6)
    made.view(-1)[1:2] = 0
    return made.to(DEVICE)


@pytest.mark.parametrize("steps,directions", UPDATES)
@pytest.mark.parametrize("i", range(4))
def test_update_along_the_noise_equals_the_reference(i, steps, directions):
    """Bit for bit, and the rows around the weight stay as they were."""
    rows, cols, bits, group_size = case(5 * i + 2 * steps + directions)
    around, _, _, by_row, by_col, _, _ = made(rows + 2, cols, bits, group_size, GIVEN[4 * i])
    by_row, before = None if by_row is None else by_row[1:-1].contiguous(), around.clone()
    tail = (torch.tensor([SEED, STEP], device=DEVICE), coefs_of(steps, directions), UID, group_size, by_row, by_col, False)
    expected = around[1:-1].clone()
    kernels.launch_update_latent(around[1:-1], *tail)
    update_latent_(expected, *tail)
    assert torch.equal(around[1:-1], expected) and not torch.equal(expected, before[1:-1])
    assert torch.equal(around[0], before[0]) and torch.equal(around[-1], before[-1])


@pytest.mark.parametrize("i", range(16))
def test_realized_update_equals_the_reference(i):
    """Bit for bit, whatever is not given, for one step or two."""
    rows, cols, bits, group_size = case(i)
    weight, step, zero, *units, s_in, s_out = made(rows, cols, bits, group_size, GIVEN[i])
    expected, before = weight.clone(), weight.clone()
    realized = Realized(step, zero, bits, s_in, s_out, 0.7)
    tail = (torch.tensor([SEED, STEP], device=DEVICE), coefs_of(1 + i % 2, 1), UID, group_size, *units, False, realized)
    kernels.launch_update_latent(weight, *tail)
    update_latent_(expected, *tail)
    assert torch.equal(weight, expected) and (weight.numel() < 100 or not torch.equal(weight, before))


@pytest.mark.parametrize("with_grid", EITHER, ids=["latent", "realized"])
def test_update_along_gaussian_noise(with_grid):
    """Equal but for the last bits of the noise: a code that they move moves its weight by a whole step over 2·eps."""
    weight, step, zero, *units, s_in, s_out = made(9, 257, 4, 32, (True,) * 4)
    expected, tail = weight.clone(), (torch.tensor([SEED, STEP], device=DEVICE), coefs_of(2, 1), UID, 32, *units, True)
    realized = Realized(step, zero, 4, s_in, s_out, 0.7) if with_grid else None
    kernels.launch_update_latent(weight, *tail, realized)
    update_latent_(expected, *tail, realized)
    near = torch.isclose(weight, expected, rtol=1e-5, atol=1e-6)
    assert float(near.float().mean()) > 0.99 if with_grid else bool(near.all())


@pytest.mark.parametrize("with_grid", EITHER, ids=["latent", "realized"])
def test_steps_at_once_equal_steps_one_by_one(with_grid):
    """A replay applies many journaled steps in one pass, padded with zeros: the same bits; zeros alone change none."""
    weight, step, zero, *units, s_in, s_out = made(5, 172, 3, 32, (True,) * 4)
    realized, coefs = Realized(step, zero, 3, s_in, s_out, 0.7) if with_grid else None, coefs_of(3, 1)
    one_by_one, untouched = weight.clone(), weight.clone()
    for s in range(3):
        at = torch.tensor([SEED, STEP + s], device=DEVICE)
        kernels.launch_update_latent(one_by_one, at, coefs[s : s + 1], UID, 32, *units, False, realized)
    at = torch.tensor([SEED, STEP], device=DEVICE)
    kernels.launch_update_latent(weight, at, torch.cat([coefs, torch.zeros_like(coefs)]), UID, 32, *units, False, realized)
    assert torch.equal(weight, one_by_one)
    kernels.launch_update_latent(untouched, at, torch.tensor([[0.0], [-0.0]], device=DEVICE), UID, 32, *units, False, realized)
    assert torch.equal(untouched.view(torch.int32), made(5, 172, 3, 32, (True,) * 4)[0].view(torch.int32))


def test_operators_satisfy_torch():
    """Schemas and fake tensors."""
    checks = ("test_schema", "test_faketensor")
    weight, step, zero, rows, cols, s_in, s_out = made(5, 172, 4, 32, (True,) * 4)
    noise = latent_noise(3, rows, cols, False)
    forward = (weight, step, zero, s_in, s_out, noise.states, noise.eps, rows, cols, 4, 32, torch.bfloat16, UID, False)
    torch.library.opcheck(torch.ops.qzo.effective_weight, forward, test_utils=checks)
    at = torch.tensor([SEED, STEP], device=DEVICE)
    update = (weight, at, coefs_of(1, 1), step, zero, s_in, s_out, rows, cols, UID, 32, False, 4, 0.3)
    torch.library.opcheck(torch.ops.qzo.update_latent_, update, test_utils=checks)


def test_no_elements_are_no_launch():
    grid = torch.ones(0, 1, device=DEVICE)
    assert kernels.launch_effective_weight(torch.zeros(0, 8, device=DEVICE), grid, grid, 4, -1, torch.float32).shape == (1, 0, 8)
    weight = torch.ones(2, 8, device=DEVICE)
    kernels.launch_update_latent(weight, torch.tensor([0, 0], device=DEVICE), torch.zeros(0, 1, device=DEVICE), 0, -1, None, None, False)
    assert bool((weight == 1).all())
