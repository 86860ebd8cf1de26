"""Perturb and update: the Triton launchers against the reference, and the properties a journal relies on."""

import subprocess
import sys

import pytest
import torch

from qzo_kernels import ops, reference

pytest.importorskip("triton")
from qzo_kernels import perturb as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
SEED, STEP, UID = -3 << 40 | 5, 70000, 0x9ABCDEF1
GAUSSIAN_ATOL = 4e-6  # of z, whose last bits may differ between devices; times eps or the coefficients

# rows, cols (a scale tensor's groups: 1, 108, more than 128), relative, gaussian, floor, directions
CASES = [
    (1, 1, True, False, 0.2, 1),
    (1, 1, False, True, -INF, 2),
    (3, 17, False, False, -INF, 3),
    (3, 17, True, True, 0.2, 1),
    (17, 1, True, False, -INF, 4),
    (63, 3, False, False, 0.2, 1),
    (63, 108, True, False, 0.2, 2),
    (17, 108, False, True, 0.2, 3),
    (172, 1, False, False, 0.2, 2),
    (257, 3, True, True, -INF, 1),
    (3, 172, True, False, 0.2, 1),
    (1, 257, False, False, -INF, 5),
    (5, 257, True, True, 0.2, 2),
    (2, 600, False, True, -INF, 1),
    (130, 130, True, False, -INF, 1),
]
CASE = "rows,cols,relative,gaussian,floor,directions"


def make(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return (torch.rand(rows, cols, generator=generator) + 0.2).to(DEVICE)


def one(*fields: int) -> torch.Tensor:
    """The state of one variant."""
    return state(*fields)[None]


def state(*fields: int) -> torch.Tensor:
    return torch.tensor(fields, dtype=torch.int64, device=DEVICE)


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor, gaussian: bool, factor: float) -> None:
    if gaussian:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1.3 * GAUSSIAN_ATOL * factor)
    else:
        assert same_bytes(ours, theirs)


@pytest.mark.parametrize(CASE, CASES)
def test_perturb_equals_reference(poison, rows, cols, relative, gaussian, floor, directions):
    values = make(rows, cols)
    for states, eps in ((one(SEED, STEP, directions), f32(0.3)), (one(SEED, STEP, 0).repeat(3, 1), f32(-0.3, 0.0, 0.1))):
        states[-1, 2] += 1
        arguments = (values, states, eps, UID, floor, relative, gaussian)
        assert_agree(kernels.launch_perturb(*arguments), reference.perturb(*arguments), gaussian, 0.3)


@pytest.mark.parametrize(CASE, CASES)
def test_update_equals_reference(rows, cols, relative, gaussian, floor, directions):
    """Several directions, in place; the rows around the tensor stay as they were."""
    coefs = f32(*[0.05 * (-0.7) ** i for i in range(3 * directions)]).view(3, directions)
    around = make(rows + 2, cols)
    ours, theirs = around.clone(), around[1:-1].clone()
    kernels.launch_update(ours[1:-1], state(SEED, STEP), coefs, UID, floor, relative, gaussian)
    reference.update_(theirs, state(SEED, STEP), coefs, UID, floor, relative, gaussian)
    assert_agree(ours[1:-1], theirs, gaussian, float(coefs.abs().sum()))
    assert same_bytes(ours[0], around[0]) and same_bytes(ours[-1], around[-1])


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_reference_is_the_equation(relative):
    """In float64 from the noise itself: v(1 + εz), v + εz; v(1 − Σ a z), v − Σ a z; then the floor."""
    values, coefs = make(9, 40), [0.1, -0.25, 0.05]
    z = [reference.rademacher((9, 40), SEED, STEP, i, UID, DEVICE).double() for i in range(3)]
    moved = values.double() * (1 + 0.3 * z[2]) if relative else values.double() + 0.3 * z[2]
    ours = reference.perturb(values, one(SEED, STEP, 2), f32(0.3), UID, 0.25, relative, False)[0]
    torch.testing.assert_close(ours.double(), moved.clamp(min=0.25), rtol=0, atol=3e-7)
    assert float(ours.min()) == 0.25
    c = sum(a * direction for a, direction in zip(coefs, z))
    expected = (values.double() * (1 - c) if relative else values.double() - c).clamp(min=0.25)
    reference.update_(values, state(SEED, STEP), f32(*coefs)[None], UID, 0.25, relative, False)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("launch", [kernels.launch_perturb, reference.perturb, ops.perturb], ids=["triton", "torch", "op"])
@pytest.mark.parametrize("relative,gaussian", [(True, False), (False, False), (False, True)])
def test_eps_of_zero_returns_the_same_bytes(launch, relative, gaussian):
    values = make(5, 40)
    values[0, 0], values[1, 1] = -0.0, 0.0
    ours = launch(values, one(SEED, STEP, 0), f32(0.0), UID, -INF, relative, gaussian)
    assert same_bytes(ours[0], values) and ours.data_ptr() != values.data_ptr()


@pytest.mark.parametrize("launch", [kernels.launch_update, reference.update_, ops.update_], ids=["triton", "torch", "op"])
@pytest.mark.parametrize("relative,gaussian", [(True, False), (False, False), (False, True)])
def test_coefficients_of_zero_change_no_byte(launch, relative, gaussian):
    values = make(5, 40)
    values[0, 0], values[1, 1] = -0.0, 0.0
    before = values.clone()
    launch(values, state(SEED, STEP), f32(0.0, -0.0, 0.0).view(3, 1), UID, -INF, relative, gaussian)
    assert same_bytes(values, before)


@pytest.mark.parametrize("launch", [kernels.launch_update, reference.update_], ids=["triton", "torch"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_steps_at_once_equal_steps_one_by_one(launch, relative):
    """A replay applies many journaled steps in one pass, padded with zeros: the same bytes."""
    values, coefs = make(7, 150), 0.03 * torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    one_by_one = values.clone()
    for step in range(6):
        launch(one_by_one, state(SEED, STEP + step), coefs[step : step + 1].contiguous(), UID, 0.1, relative, False)
    padded = torch.cat([coefs, torch.zeros_like(coefs[:2])])
    launch(values, state(SEED, STEP), padded, UID, 0.1, relative, False)
    assert same_bytes(values, one_by_one)


@pytest.mark.parametrize("perturb,update", [(kernels.launch_perturb, kernels.launch_update), (reference.perturb, reference.update_)])
def test_not_a_number_is_not_hidden_by_the_floor(perturb, update):
    values = make(2, 5)
    values[1, 2] = float("nan")
    ours = perturb(values, one(SEED, STEP, 0), f32(0.1), UID, 0.2, True, False)
    update(values, state(SEED, STEP), f32(0.1)[None], UID, 0.2, True, False)
    assert ours.isnan().sum() == 1 and bool(ours[0, 1, 2].isnan())
    assert values.isnan().sum() == 1 and bool(values[1, 2].isnan())


def test_operators():
    """The registered operators give what the launcher of the device gives, and satisfy torch's operator checks."""
    values, coefs = make(3, 10), f32(0.1, 0.2)[None]
    tail = (UID, 0.2, True, False)
    expected = kernels.launch_perturb(values, one(SEED, STEP, 1), f32(0.1), *tail)
    assert same_bytes(torch.ops.qzo.perturb(values, one(SEED, STEP, 1), f32(0.1), *tail), expected)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qzo.perturb, (values, one(SEED, STEP, 1), f32(0.1), *tail), test_utils=checks)
    torch.library.opcheck(torch.ops.qzo.update_, (values, state(SEED, STEP), coefs, *tail), test_utils=checks)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"values": make(3, 4).half()}, "values: torch.float16"),
        ({"values": make(3, 4)[0]}, "2 dimensions"),
        ({"values": make(4, 3).t()}, "values: strides"),
        ({"state": state(1, 2, 3)}, "state: "),
        ({"state": one(1, 2, 3).int()}, "state: torch.int32"),
        ({"eps": f32(1.0)[None]}, "eps: "),
        ({"eps": f32(1.0, 2.0)}, "state: "),
        ({"uid": 1 << 32}, "uid: 4294967296"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"values": make(3, 4), "state": one(1, 2, 3), "eps": f32(0.1), "uid": 1, "floor": 0.0}
    with pytest.raises(ValueError, match=message):
        ops.perturb(**{**arguments, **change}, relative=True, gaussian=False)


def test_triton_is_imported_late():
    code = "import sys, qzo_kernels.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
