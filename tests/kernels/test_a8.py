"""Low-bit activations: rounding rows of x, unpacking weights, and the operators made of them and of the product."""

from functools import partial

import pytest
import torch
from a8_operands import COMPILED, DEVICE, KINDS, activations, distance, generator, operands, weight

from qzo_kernels import ops, ops_a8, reference, reference_a8

pytest.importorskip("triton")
from qzo_kernels.a8_rows import launch_group_sums, launch_quantize_rows, launch_unpack  # noqa: E402


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantize_reference_is_the_equation(kind):
    x = activations(17, 63)
    q, scale = reference_a8.quantize_rows(x, kind)
    largest = reference_a8.LARGEST[kind][1]
    rest = torch.arange(17) != 8
    assert not q[8].float().any() and scale[8] == 0
    torch.testing.assert_close(scale[rest], x.abs().amax(1)[rest] / largest)
    assert torch.equal(q.float().abs().amax(1)[rest], torch.full((16,), largest, device=DEVICE))
    error = (q.float() * scale[:, None] - x).abs()
    step = scale[:, None] / 2 if kind == "int8" else torch.maximum(x.abs() / 16, scale[:, None] * 2.0**-10)
    assert bool((error <= step * 1.0001).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,cols", [(1, 1), (3, 63), (17, 172), (63, 257), (4, 5120), (3, 16385)])
def test_quantize_launcher_equals_reference(rows, cols, dtype, kind):
    x = activations(rows, cols, dtype)
    q, scale = launch_quantize_rows(x, kind)
    expected, expected_scale = reference_a8.quantize_rows(x, kind)
    assert torch.equal(scale, expected_scale)
    assert q.dtype == expected.dtype and torch.equal(q.float(), expected.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [launch_quantize_rows, reference_a8.quantize_rows])
def test_quantize_never_hides_a_broken_row(quantize, kind):
    """A NaN or an infinity makes the scale NaN, and so every output of its row; ties go to even; tiny rows are zeros."""
    x = torch.ones(6, 40, device=DEVICE)
    x[0, 3], x[1, 39], x[2, 0] = float("nan"), float("inf"), float("-inf")
    x[3] = 1e-31
    x[4, 0], x[4, 1:5] = 127.0, torch.tensor([0.5, 1.5, -2.5, -3.5], device=DEVICE)
    x[5] = torch.finfo(torch.float32).max
    q, scale = quantize(x, kind)
    assert bool(scale[:3].isnan().all()) and not q[:3].float().any()
    assert scale[3] == 0 and not q[3].float().any()
    assert bool(scale[4:].isfinite().all()) and bool((q[5].float() == reference_a8.LARGEST[kind][1]).all())
    if kind == "int8":
        assert q[4, 1:5].tolist() == [0, 2, -2, -4]


# bits, rows, cols, group size, zeros: None, stride 0, or one per group
WEIGHTS = [
    (2, 1, 1, 1, "none"),
    (2, 63, 172, 32, "each"),
    (3, 17, 257, 64, "each"),
    (3, 3, 129, 257, "same"),
    (4, 63, 300, 128, "each"),
    (4, 17, 172, 32, "none"),
    (4, 3, 1728, 96, "same"),
    (8, 3, 172, 64, "each"),
    (8, 63, 257, 1000, "none"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits,rows,cols,group_size,which", WEIGHTS)
def test_unpack_launcher_and_reference_are_the_difference(bits, rows, cols, group_size, which, kind):
    """Exactly q - zero (q - 128 for 8 bits, or e4m3 bytes as they are), and not a byte beyond the output."""
    dtype, bytewise = reference_a8.LARGEST[kind][0], bits == 8 and kind == "fp8"
    codes, words, _, zeros = weight(bits, rows, cols, group_size, "none" if bytewise else which)
    group = torch.arange(cols, device=DEVICE) // group_size
    zero = 1 << (bits - 1) if bits == 8 or zeros is None else zeros[:, group].int()
    expected = codes.view(dtype) if bytewise else (codes.int() - zero).to(dtype)
    around = torch.full((rows + 2, cols), 77, dtype=torch.uint8, device=DEVICE).view(dtype)
    launch_unpack(words, zeros, bits, group_size, cols, around[1:-1])
    assert torch.equal(around[1:-1].view(torch.uint8), expected.view(torch.uint8))
    assert bool((around.view(torch.uint8)[[0, -1]] == 77).all())
    out = torch.empty_like(expected)
    reference_a8.unpack(words, zeros, bits, group_size, out)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows,cols,group_size", [(1, 1, 1), (17, 172, 32), (3, 257, 64), (5, 5000, 1 << 20)])
def test_group_sums(rows, cols, group_size):
    q = torch.randint(-127, 128, (rows, cols), generator=generator(cols), dtype=torch.int8).to(DEVICE)
    expected = torch.stack([part.long().sum(1) for part in q.split(group_size, 1)], 1)
    small = (q // 8).to(torch.float8_e4m3fn)
    for sums in (launch_group_sums, reference_a8.group_sums):
        found = sums(q, group_size)
        assert found.dtype == torch.int32 and torch.equal(found.long(), expected)
        assert torch.equal(sums(small, group_size), torch.stack([part.float().sum(1) for part in small.split(group_size, 1)], 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits,which", [(2, "each"), (3, "none"), (4, "each"), (4, "same"), (8, "each"), (8, "none")])
def test_quant_matmul_a8(bits, which, kind):
    """Near the matmul with unrounded x, and exactly its parts one after the other; noise and scratch as in quant_matmul."""
    if bits == 8 and kind == "fp8":
        kind = "int8"
    codes, words, scales, zeros = weight(bits, 63, 300, 64, which)
    x = activations(8, 300, torch.float16 if not COMPILED else torch.bfloat16).clamp(-100, 100).view(2, 4, 300)
    bias = torch.randn(63, generator=generator(3)).to(x.dtype).to(DEVICE)
    noise = ops.Noise(torch.tensor([[1, 2, 0], [1, 2, 0]], device=DEVICE), torch.tensor([0.1, -0.1], device=DEVICE), 5, 0.0, True, False)
    scratch = torch.empty(63 * 300 + 5, dtype=torch.uint8, device=DEVICE)
    every = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8) if zeros is None else zeros
    for n, s in ((None, None), (noise, scratch)):
        y = ops_a8.quant_matmul_a8(x, words, scales, zeros, bits, 64, kind, bias, n, s)
        seen = scales[None] if n is None else reference.perturb(scales, *n)
        exact = reference.quant_matmul(x.view(8, 300).float(), words, seen, every, bits, 64, bias.float())
        assert y.shape == (2, 4, 63) and y.dtype == x.dtype
        assert distance(y.view(8, 63), exact) < (0.03 if kind == "int8" else 0.06)


def test_operators_satisfy_torch():
    """Schemas and fake tensors."""
    checks = ("test_schema", "test_faketensor")
    x = activations(6, 172)
    torch.library.opcheck(torch.ops.qzo.quantize_rows, (x, "int8"), test_utils=checks)
    _, words, scales, zeros = weight(4, 17, 172, 32, "each")
    out = torch.empty(17, 172, dtype=torch.int8, device=DEVICE)
    torch.library.opcheck(torch.ops.qzo.unpack, (words, zeros, out, 4, 32), test_utils=checks)
    xq, x_scale = ops_a8.quantize_rows(x, "int8")
    arguments = (xq, x_scale, out, scales[None], 32, torch.float16)
    torch.library.opcheck(torch.ops.qzo.a8_matmul, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.qzo.a8_matmul, (*arguments, None, zeros, None), test_utils=checks)
    _, words, scales, zeros = weight(4, 17, 256, 128, "each")
    state, eps = torch.tensor([[1, 2, 0]], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    packed = (activations(6, 256), words, scales, zeros, None, state, eps, 4, 128, "int8", 5, 0.0, True, False)
    torch.library.opcheck(torch.ops.qzo.a8_packed, packed, test_utils=checks)


MATMUL = {"xq": 0, "x_scale": 1, "wq": 2, "scales": 3, "group_size": 4, "dtype": 5, "bias": 6, "zeros": 7, "xsums": 8}


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("xq", torch.zeros(6, 64), "xq: torch.float32; expected torch.int8"),
        ("xq", torch.zeros(5, 64, dtype=torch.int8), r"x_scale: .*\(6,\); expected .*\(5,\)"),
        ("x_scale", torch.zeros(6, dtype=torch.float16), "x_scale: torch.float16"),
        ("wq", torch.zeros(17, 64, dtype=torch.float8_e4m3fn), "wq: torch.float8_e4m3fn"),
        ("wq", torch.zeros(64, 17, dtype=torch.int8).t(), "wq: strides"),
        ("scales", torch.zeros(4, 17, 2), "xq: 6 rows; expected a multiple of the 4 variants"),
        ("scales", torch.zeros(17, 2), "scales: shape"),
        ("group_size", 48, "group_size = 48: 8-bit activations take multiples of 32"),
        ("group_size", 0, "group_size = 0"),
        ("dtype", torch.float64, "dtype: torch.float64"),
        ("bias", torch.zeros(17, dtype=torch.float16), "bias: torch.float16"),
        ("zeros", torch.zeros(17, 3, dtype=torch.uint8), "zeros: "),
        ("xsums", torch.zeros(6, 2), "xsums: torch.float32"),
    ],
)
def test_bad_arguments_of_the_product_are_named(name, value, message):
    arguments = [*operands("int8", 2, 3, 17, 64, 32), 32, torch.float32, None, None, None]
    arguments[MATMUL[name]] = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops_a8.a8_matmul(*arguments)


def test_other_bad_arguments_are_named(monkeypatch):
    _, words, scales, zeros = weight(8, 17, 64, 32, "each")
    x = activations(3, 64)
    for call in (partial(ops_a8.unpack, words, zeros, 8, 32, 64), partial(ops_a8.quant_matmul_a8, x, words, scales, zeros, 8, 32)):
        with pytest.raises(ValueError, match="zeros: given with e4m3 codes of 8 bits"):
            call("fp8")
    with pytest.raises(ValueError, match="kind = 'int4'"):
        ops_a8.quant_matmul_a8(x, words, scales, zeros, 8, 32, "int4")
    with pytest.raises(ValueError, match="scratch: torch.uint8 of 7 "):
        ops_a8.quant_matmul_a8(x, words, scales, zeros, 8, 32, "int8", scratch=torch.empty(7, dtype=torch.uint8, device=DEVICE))
    with pytest.raises(ValueError, match="group_size = 40"):
        ops_a8.unpack(words, None, 8, 40, 64, "int8")
    with pytest.raises(ValueError, match="x: strides"):
        ops_a8.quantize_rows(x.t(), "int8")
    with pytest.raises(ValueError, match="zeros: given with xq of torch.float8_e4m3fn"):
        one = operands("fp8", 1, 3, 17, 64, 32)
        ops_a8.a8_matmul(*one, 32, torch.float32, None, zeros)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")
    with pytest.raises(ValueError, match="fp8: Card of capability 8.0; expected 8.9"):
        ops_a8._check_kind("xq", torch.float8_e4m3fn, torch.device("cuda"))
