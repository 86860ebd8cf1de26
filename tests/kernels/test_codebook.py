"""Weights whose codes name levels of a table: the reference against plain indexing, the Triton launcher against the reference."""

import pytest
import torch
from test_dequant import DEVICE, DTYPES, NOISES, poisoned

from qzo_kernels import ops, reference
from qzo_kernels.pack import tile_codes

pytest.importorskip("triton")
from qzo_kernels.dequant import launch_dequantize  # noqa: E402

# bits, rows, cols, group size: one element, rows that fill no tile, partial last groups, odd sizes, > 128 groups
CASES = [(2, 17, 172, 32), (3, 63, 257, 20), (4, 1, 1, 64), (4, 3, 64, 64), (4, 63, 63, 5), (4, 17, 1728, 64), (4, 2, 9000, 64), (8, 5, 257, 64)]
CASE = "bits,rows,cols,group_size"
pytestmark = pytest.mark.usefixtures("poison")


def make(bits, rows, cols, group_size):
    """(codes u8 [N, K], arguments of dequantize before dtype, codebook); the levels are in no order, and one of them is -0."""
    g = torch.Generator().manual_seed(bits * rows + cols)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=g, dtype=torch.uint8)
    scales = torch.rand(rows, -(-cols // group_size), generator=g).to(DEVICE) / 100
    codebook = torch.randn(1 << bits, generator=g).to(DEVICE)
    codebook[1] = -0.0
    return codes.to(DEVICE), (tile_codes(codes, bits).to(DEVICE), scales, None, bits, group_size, cols), codebook


def bits_of(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize(CASE, CASES)
def test_reference_is_the_equation(bits, rows, cols, group_size):
    codes, arguments, codebook = make(bits, rows, cols, group_size)
    exact = codebook[codes.long()] * arguments[1][:, torch.arange(cols, device=DEVICE) // group_size]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(bits_of(reference.dequantize(*arguments, dtype, codebook=codebook)), bits_of(exact.to(dtype)))


@pytest.mark.parametrize(CASE, CASES)
def test_launcher_equals_reference(bits, rows, cols, group_size):
    """Every dtype, bit for bit; the rows around the output keep their NaN."""
    _, arguments, codebook = make(bits, rows, cols, group_size)
    for dtype in DTYPES:
        around = poisoned(rows + 2, cols, dtype)
        launch_dequantize(*arguments, around[1:-1], None, codebook)
        assert torch.equal(bits_of(around[1:-1]), bits_of(reference.dequantize(*arguments, dtype, codebook=codebook)))
        assert bool(around[0].isnan().all()) and bool(around[-1].isnan().all())


@pytest.mark.parametrize("relative,gaussian", NOISES)
@pytest.mark.parametrize(CASE, CASES)
def test_noise_is_on_the_scales(bits, rows, cols, group_size, relative, gaussian):
    """What `perturb` and `dequantize` give one after the other; eps = 0 is no noise."""
    _, arguments, codebook = make(bits, rows, cols, group_size)
    state = torch.tensor([[-5, 70000, 3]], device=DEVICE)
    for eps in (0.25, 0.0):
        noise = ops.Noise(state, torch.tensor([eps], device=DEVICE), 0x9ABCDEF1, 2e-3, relative, gaussian)
        out = poisoned(rows, cols, torch.float32)
        launch_dequantize(*arguments, out, noise, codebook)
        seen = reference.perturb(arguments[1], *noise)[0]
        expected = reference.dequantize(arguments[0], seen, *arguments[2:], torch.float32, codebook=codebook)
        if gaussian and eps:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(out, expected)
        assert torch.equal(ops.dequantize(*arguments, torch.float32, noise=noise, codebook=codebook), expected) or DEVICE == "cuda"


@pytest.mark.parametrize("variants", [0, 3])
def test_matmul_dequantizes(variants):
    codes, arguments, codebook = make(4, 33, 192, 64)
    x = torch.randn(6, 192, device=DEVICE, dtype=DTYPES[-1] if DEVICE == "cuda" else torch.float32)
    bias = torch.randn(33, device=DEVICE, dtype=x.dtype)
    noise, seen = None, arguments[1][None]
    if variants:
        state = torch.tensor([[1, 2, v] for v in range(variants)], device=DEVICE)
        noise = ops.Noise(state, torch.tensor([0.2, -0.2, 0.0], device=DEVICE), 7, 1e-4, True, False)
        seen = reference.perturb(arguments[1], *noise)
    y = ops.quant_matmul(x, *arguments[:-1], bias, noise, codebook=codebook)
    expected = reference.quant_matmul(x.float(), arguments[0], seen, None, 4, 64, bias.float(), codebook)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-6 if x.dtype == torch.float32 else 1e-2)
    with pytest.raises(ValueError, match="route: 'fused'; expected one of .'dequantize',."):
        ops.quant_matmul(x, *arguments[:-1], bias, noise, route="fused", codebook=codebook)


def test_operator():
    _, arguments, codebook = make(4, 17, 192, 64)
    out = poisoned(17, 192, torch.float32)
    noise = ops.Noise(torch.tensor([[1, 2, 0]], device=DEVICE), torch.tensor([0.1], device=DEVICE), 5, 0.0, True, False)
    flat = (*arguments[:3], out, noise.state, noise.eps, *arguments[3:], *noise[2:], codebook)
    torch.library.opcheck(torch.ops.qzo.dequantize, flat, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_are_named():
    _, arguments, codebook = make(4, 3, 64, 32)
    zeros = torch.zeros(3, 2, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="zeros: given with a codebook"):
        ops.dequantize(*arguments[:2], zeros, *arguments[3:], torch.float32, codebook=codebook)
    for wrong, says in ((codebook[:8], r"codebook: .* \(8,\); expected .* \(16,\)"), (codebook.half(), "codebook: torch.float16"),
                        (codebook.repeat(2)[::2], "codebook: strides")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            ops.dequantize(*arguments, torch.float32, codebook=wrong)
        with pytest.raises(ValueError, match=says):
            ops.quant_matmul(torch.zeros(2, 64, device=DEVICE), *arguments[:-1], codebook=wrong)
