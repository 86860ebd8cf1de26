"""Dequantize: the reference against plain indexing, and the Triton launcher against the reference."""

import pytest
import torch

from qzo_kernels import ops, reference
from qzo_kernels.pack import tile_codes

pytest.importorskip("triton")
from qzo_kernels.dequant import launch_dequantize  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates fp32 to bf16 where compiled code rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")

# bits, rows, cols, group size, stride-0 zeros; group sizes: one group, partial last groups, odd sizes, > 128 groups
CASES = [
    (2, 1, 1, 1, False),
    (2, 63, 172, 32, True),
    (2, 17, 257, 128, False),
    (2, 3, 172, 1, False),
    (3, 3, 17, 4, False),
    (3, 17, 172, 32, True),
    (3, 63, 257, 20, False),
    (3, 257, 63, 64, False),
    (3, 1, 1728, 16, True),
    (4, 1, 3, 128, True),
    (4, 172, 172, 32, False),
    (4, 3, 257, 257, False),
    (4, 17, 1728, 16, True),
    (4, 63, 63, 5, False),
    (4, 257, 17, 8, True),
    (8, 17, 1, 32, False),
    (8, 3, 172, 12, True),
    (8, 63, 257, 64, False),
    (8, 2, 600, 4, False),
]
CASE = "bits,rows,cols,group_size,symmetric"


def make(bits: int, rows: int, cols: int, group_size: int, symmetric: bool) -> tuple:
    """(codes u8 [N, K], arguments of dequantize before dtype)."""
    generator = torch.Generator().manual_seed(bits * rows + cols)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)
    groups = -(-cols // group_size)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8).to(DEVICE)
    if symmetric:
        zeros = None
    scales = torch.rand(rows, groups, generator=generator).to(DEVICE) / 100
    return codes.to(DEVICE), (tile_codes(codes, bits).to(DEVICE), scales, zeros, bits, group_size, cols)


def poisoned(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, cols), float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(CASE, CASES)
def test_reference_is_the_equation(bits, rows, cols, group_size, symmetric):
    codes, arguments = make(bits, rows, cols, group_size, symmetric)
    group = torch.arange(cols, device=DEVICE) // group_size
    zero = 1 << (bits - 1) if symmetric else arguments[2][:, group].float()
    exact = (codes.float() - zero) * arguments[1][:, group]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(reference.dequantize(*arguments, dtype), exact.to(dtype))
        out = poisoned(rows, cols, dtype)
        assert reference.dequantize(*arguments, dtype, out) is out and torch.equal(out, exact.to(dtype))


def test_reference_in_chunks(monkeypatch):
    _, arguments = make(4, 63, 172, 32, False)
    whole = reference.dequantize(*arguments, torch.float32)
    monkeypatch.setattr(reference, "_CHUNK", 10 * 172 + 1)
    assert torch.equal(reference.dequantize(*arguments, torch.float32), whole)


@pytest.mark.parametrize(CASE, CASES)
def test_launcher_equals_reference(bits, rows, cols, group_size, symmetric):
    """Every dtype, bit for bit; the rows around the output keep their NaN."""
    _, arguments = make(bits, rows, cols, group_size, symmetric)
    for dtype in DTYPES:
        around = poisoned(rows + 2, cols, dtype)
        launch_dequantize(*arguments, around[1:-1])
        assert torch.equal(around[1:-1], reference.dequantize(*arguments, dtype))
        assert bool(around[0].isnan().all()) and bool(around[-1].isnan().all())


NOISES = [(True, False), (False, False), (True, True)]


@pytest.mark.parametrize("relative,gaussian", NOISES)
@pytest.mark.parametrize(CASE, CASES)
def test_launcher_under_noise_sees_the_perturbed_scales(bits, rows, cols, group_size, symmetric, relative, gaussian):
    """Bit for bit what `perturb` and `dequantize` give one after the other; eps = 0 is no noise."""
    _, arguments = make(bits, rows, cols, group_size, symmetric)
    state = torch.tensor([[-5, 70000, 3]], device=DEVICE)
    for eps in (0.25, 0.0):
        noise = ops.Noise(state, torch.tensor([eps], device=DEVICE), 0x9ABCDEF1, 2e-3, relative, gaussian)
        seen = reference.perturb(arguments[1], *noise)[0]
        out = poisoned(rows, cols, torch.float32)
        launch_dequantize(*arguments, out, noise)
        expected = reference.dequantize(arguments[0], seen, *arguments[2:], torch.float32)
        if gaussian and eps:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator(dtype):
    """The registered operator equals the reference, with and without `out`, and satisfies torch's operator checks."""
    _, arguments = make(4, 17, 172, 32, True)
    expected = reference.dequantize(*arguments, dtype)
    out = poisoned(17, 172, dtype)
    assert torch.equal(ops.dequantize(*arguments, dtype), expected)
    assert ops.dequantize(*arguments, dtype, out) is out and torch.equal(out, expected)
    noise = ops.Noise(torch.tensor([[1, 2, 0]], device=DEVICE), torch.tensor([0.1], device=DEVICE), 5, 0.0, True, False)
    flat = (*arguments[:3], out, noise.state, noise.eps, *arguments[3:], *noise[2:])
    torch.library.opcheck(torch.ops.qzo.dequantize, flat, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "position,value,message",
    [
        (0, torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), "codes: torch.int64"),
        (1, torch.zeros(3, 4, device=DEVICE), r"scales: .* \(3, 4\)"),
        (1, torch.zeros(3, 2, dtype=torch.float16, device=DEVICE), "scales: torch.float16"),
        (2, torch.zeros(1, 2, dtype=torch.uint8, device=DEVICE), r"zeros: .* \(1, 2\)"),
        (3, 5, "bits = 5"),
        (4, 0, "group_size = 0"),
        (6, torch.float64, "dtype: torch.float64"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    arguments = [*make(4, 3, 16, 8, False)[1], torch.float32]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.dequantize(*arguments)


def test_bad_out_is_named():
    _, arguments = make(4, 3, 16, 8, False)
    with pytest.raises(ValueError, match="out: torch.float16; expected torch.float32"):
        ops.dequantize(*arguments, torch.float32, poisoned(3, 16, torch.float16))
    with pytest.raises(ValueError, match="out: strides"):
        ops.dequantize(*arguments, torch.float32, poisoned(16, 3, torch.float32).t())
