"""Asymmetric activations: rounding rows of x about a zero point of their own, and the product with packed codes."""

import pytest
import torch
from a8_operands import COMPILED, DEVICE, activations, distance, generator, weight

from qzo_kernels import ops, ops_asym, reference, reference_a8
from qzo_kernels.pack import tile_codes
from qzo_kernels.reference_qat import fake_quantize_rows, row_grid

pytest.importorskip("triton")
from qzo_kernels.a8_asym import launch_quantize_rows_asym  # noqa: E402
from qzo_kernels.a8_matmul import launch_a8_matmul  # noqa: E402
from qzo_kernels.a8_packed import launch_a8_packed  # noqa: E402

EITHER = pytest.mark.parametrize("quantize", [launch_quantize_rows_asym, reference_a8.quantize_rows_asym], ids=["triton", "torch"])
SPANS = [None, 0.83, 1.2]


def rows_of(kind: str, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = activations(rows, cols)
    if kind == "positive":
        x = x.abs() + 3
    elif kind == "negative":
        x = -x.abs() * 0.01 - 2
    elif kind == "constant":
        x = torch.linspace(-5, 70, rows, device=DEVICE)[:, None].expand(rows, cols)
    return x.clamp(-1e4, 1e4).to(dtype).contiguous()


def span_of(value: float | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("kind", ["both", "positive", "negative", "constant"])
@pytest.mark.parametrize("bits", ops_asym.ACTIVATION_BITS)
def test_codes_are_those_of_fake_quantize_rows(bits, kind, span):
    """x̂ from the codes, Δ and z, bit for bit; scale·q + shift is x̂ but for rounding."""
    x, half = rows_of(kind, 17, 63), 1 << (bits - 1)
    q, scale, shift = reference_a8.quantize_rows_asym(x, bits, span_of(span))
    seen = fake_quantize_rows(x, bits, span_of(span))
    step, zero = row_grid(x, bits, span_of(span))
    assert torch.equal(scale[:, None] * (q.float() + half - zero), seen)
    assert int(q.min()) >= -half and int(q.max()) < half
    assert distance(scale.double()[:, None] * q.double() + shift.double()[:, None], seen) < 1e-6
    if kind == "both" and span is None:
        assert int(q.min()) == -half and int(q.max()) == half - 1


@pytest.mark.parametrize("rows,cols", [(1, 1), (3, 63), (17, 172), (5, 257), (4, 5120), (3, 16385)])
@pytest.mark.parametrize("bits,kind,span", [(4, "both", None), (6, "positive", 0.83), (8, "negative", 1.2), (4, "constant", None), (8, "both", 0.9)])
def test_launcher_equals_reference(poison, bits, kind, span, rows, cols):
    x = rows_of(kind, rows, cols, (torch.float32, torch.float16, torch.bfloat16)[(rows + bits) % 3])
    for ours, expected in zip(
        launch_quantize_rows_asym(x, bits, span_of(span)), reference_a8.quantize_rows_asym(x, bits, span_of(span)), strict=True
    ):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@EITHER
def test_ties_go_to_even(quantize):
    """Δ = 1 and z = 0: halves on both sides of an even code."""
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 6.5, 14.5, 15.0]], device=DEVICE)
    q, scale, shift = quantize(x, 4, None)
    assert scale.item() == 1 and shift.item() == 8 and (q[0] + 8).tolist() == [0, 0, 2, 2, 6, 14, 15]


@EITHER
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_broken_row_is_never_hidden(quantize, bits):
    """A NaN, an infinity, or a grid beyond fp32 makes scale and shift NaN; zeros, constants and large rows are sound."""
    x = torch.ones(8, 40, device=DEVICE)
    x[0, 3], x[1, 39], x[2, 0], x[7, 5] = float("nan"), float("inf"), float("-inf"), -float("nan")
    x[3, 0], x[3, 1] = 3e38, -3e38
    x[4] = 0
    x[5] = -7.0
    x[6, ::2] = 1e38
    q, scale, shift = quantize(x, bits, None)
    broken = [0, 1, 2, 3, 7]
    assert bool(scale[broken].isnan().all() and shift[broken].isnan().all()) and not q[broken].any()
    seen = scale[4:7, None] * q[4:7] + shift[4:7, None]
    torch.testing.assert_close(seen, fake_quantize_rows(x, bits)[4:7])
    assert bool(fake_quantize_rows(x, bits)[broken].isnan().all())


def test_packed_rows_are_the_same_and_zero_beyond_the_end():
    """The order of packed codes changes places only: every row keeps its codes, and columns without a code are 0."""
    x = rows_of("positive", 5, 172)
    plain, padded = launch_quantize_rows_asym(x, 8, None)[0], launch_quantize_rows_asym(x, 8, None, order=4)[0]
    filled = torch.nn.functional.pad(plain, (0, 84))
    assert padded.shape == (5, 256) and torch.equal(padded.sort(1).values, filled.sort(1).values)


@pytest.mark.parametrize("bits,cols,group_size,which", [(2, 63, 32, "each"), (3, 257, 1000, "each"), (4, 300, 128, "same"), (8, 300, 64, "each"), (8, 40, 40, "none")])
def test_code_sums(bits, cols, group_size, which):
    codes, words, _, zeros = weight(bits, 17, cols, group_size, which)
    every = torch.full((17, -(-cols // group_size)), 1 << (bits - 1), device=DEVICE) if zeros is None else zeros.int()
    expected = torch.stack([part.long().sum(1) - part.shape[1] * every[:, g] for g, part in enumerate(codes.split(group_size, 1))], 1)
    sums = ops_asym.code_sums(words, zeros, bits, group_size, cols)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), expected)


# bits of the weight, group size, activation bits, rows each, variants, N, K, zeros, kind of rows, bias
PRODUCTS = [
    (2, 32, 8, 1, 1, 17, 63, "each", "positive", False),
    (3, 64, 6, 3, 2, 33, 257, "each", "positive", True),
    (4, 32, 4, 17, 1, 63, 172, "none", "negative", True),
    (4, 128, 4, 17, 2, 70, 300, "each", "positive", True),
    (4, 1 << 40, 8, 3, 1, 130, 640, "each", "constant", False),
    (4, 300, 4, 1, 3, 17, 300, "none", "both", False),
    (8, 128, 8, 3, 2, 65, 300, "each", "negative", True),
    (8, 1 << 40, 6, 17, 1, 33, 257, "each", "positive", False),
    (8, 64, 8, 1, 1, 33, 129, "each", "constant", True),
]
PRODUCT = pytest.mark.parametrize("bits,group_size,activation_bits,rows,variants,n,cols,which,kind,bias", PRODUCTS)


def case(bits, group_size, rows, variants, n, cols, which, kind, bias, dtype=torch.float32) -> tuple:
    """(x, packed weight, zeros or None, noise or None, the scales that are seen, bias or None)."""
    _, words, scales, zeros = weight(bits, n, cols, min(group_size, cols), which)
    noise = None
    if variants > 1:
        state = torch.tensor([[7, 8, v] for v in range(variants)], device=DEVICE)
        eps = torch.tensor([0.1 * (-1) ** v for v in range(variants)], device=DEVICE)
        noise = ops.Noise(state, eps, 1 << 31, 0.0, True, n % 2 == 0)
    seen = scales[None] if noise is None else reference.perturb(scales, *noise)
    shift = torch.randn(n, generator=generator(n)).to(dtype).to(DEVICE) if bias else None
    return rows_of(kind, rows * variants, cols, dtype), words, scales, zeros, noise, seen, shift


def expected_of(x, words, seen, zeros, bits, group_size, activation_bits, span, bias) -> torch.Tensor:
    """x̂ in fp32 times W, in fp64."""
    parts = []
    for part, scales in zip(fake_quantize_rows(x.float(), activation_bits, span).chunk(len(seen)), seen, strict=True):
        w = reference.dequantize(words, scales, zeros, bits, min(group_size, x.shape[1]), x.shape[1], torch.float32)
        parts.append(part.double() @ w.double().t() + (0 if bias is None else bias.double()))
    return torch.cat(parts)


@PRODUCT
def test_product_is_that_of_the_fake_quantized_rows(bits, group_size, activation_bits, rows, variants, n, cols, which, kind, bias):
    x, words, scales, zeros, noise, seen, shift = case(bits, group_size, rows, variants, n, cols, which, kind, bias)
    csum = ops_asym.code_sums(words, zeros, bits, group_size, cols)
    scratch = torch.empty(n * cols + 3, dtype=torch.uint8, device=DEVICE) if n % 2 else None
    span = span_of(0.9 if variants == 1 else None)
    y = ops_asym.quant_matmul_asym(
        x.view(variants, rows, cols), words, scales, zeros, csum, bits, group_size, activation_bits, span, shift, noise, scratch
    )
    assert y.shape == (variants, rows, n) and y.dtype == x.dtype
    assert distance(y.view(-1, n), expected_of(x, words, seen, zeros, bits, group_size, activation_bits, span, shift)) < 2e-6


@PRODUCT
def test_launchers_equal_the_reference(poison, bits, group_size, activation_bits, rows, variants, n, cols, which, kind, bias):
    """From packed codes where they may be, and through an 8-bit weight."""
    x, words, scales, zeros, noise, seen, shift = case(bits, group_size, rows, variants, n, cols, which, kind, bias)
    csum = ops_asym.code_sums(words, zeros, bits, group_size, cols)
    expected = expected_of(x, words, seen, zeros, bits, group_size, activation_bits, None, shift)
    w = torch.empty(n, cols, dtype=torch.int8, device=DEVICE)
    reference_a8.unpack(words, zeros, bits, min(group_size, cols), w)
    xq, x_scale, point = launch_quantize_rows_asym(x, activation_bits, None)
    less = zeros if bits == 8 else None
    sums = None if less is None else reference_a8.group_sums(xq, min(group_size, cols))
    y = launch_a8_matmul(
        xq, x_scale, w, seen, group_size, torch.float32, shift, less, sums, shift=point, wsum=reference_a8.row_sums(seen, csum)
    )
    assert distance(y, expected) < 2e-6
    if ops_asym.ops_a8.takes_packed(bits, group_size, cols):
        xq, x_scale, point = launch_quantize_rows_asym(x, activation_bits, None, bits)
        y = launch_a8_packed(xq, x_scale, words, scales, zeros, bits, group_size, cols, torch.float32, shift, noise, shift=point, csum=csum)
        assert distance(y, expected) < 2e-6


def test_six_bits_of_a_weight_in_fields_of_eight():
    codes = torch.randint(0, 64, (33, 300), generator=generator(6), dtype=torch.uint8)
    zeros = torch.randint(0, 64, (33, 3), generator=generator(7), dtype=torch.uint8).to(DEVICE)
    words, scales = tile_codes(codes, 8).to(DEVICE), torch.rand(33, 3, generator=generator(8)).to(DEVICE) / 100
    x = rows_of("positive", 3, 300).clamp_(max=50).to(torch.bfloat16 if COMPILED else torch.float16)
    csum = ops_asym.code_sums(words, zeros, 8, 128, 300)
    y = ops_asym.quant_matmul_asym(x, words, scales, zeros, csum, 8, 128, 6)
    expected = expected_of(x, words, scales[None], zeros, 8, 128, 6, None, None)
    assert y.dtype == x.dtype and distance(y, expected) < (8e-3 if COMPILED else 1e-3)


def test_operators_satisfy_torch():
    checks = ("test_schema", "test_faketensor")
    x, words, scales, zeros, noise, seen, bias = case(4, 128, 3, 2, 17, 256, "each", "both", True)
    torch.library.opcheck(torch.ops.qzo.quantize_rows_asym, (x, 4, span_of(0.9)), test_utils=checks)
    csum = ops_asym.code_sums(words, zeros, 4, 128, 256)
    packed = (x, words, scales, zeros, csum, None, bias, noise.state, noise.eps, 4, 128, 4, *noise[2:])
    torch.library.opcheck(torch.ops.qzo.a8_packed_asym, packed, test_utils=checks)
    xq, x_scale, shift = ops_asym.quantize_rows_asym(x, 4)
    w = torch.zeros(17, 256, dtype=torch.int8, device=DEVICE)
    arguments = (xq, x_scale, w, seen, 128, torch.float16, None, None, None, shift, reference_a8.row_sums(seen, csum))
    torch.library.opcheck(torch.ops.qzo.a8_matmul, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"activation_bits": 16}, "activation bits = 16: expected one of"),
        ({"span": torch.ones(2)}, "span: .*expected torch.float32 of shape"),
        ({"csum": torch.zeros(17, 2)}, "csum: torch.float32"),
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x: torch.int32"),
        ({"scratch": torch.zeros(7, dtype=torch.uint8)}, "scratch: torch.uint8 of 7 "),
        ({"group_size": 40}, "group_size = 40: 8-bit activations take multiples of 32"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    _, words, scales, zeros = weight(4, 17, 64, 32, "each")
    csum = ops_asym.code_sums(words, zeros, 4, 32, 64)
    given = {"x": rows_of("both", 3, 64), "codes": words, "scales": scales, "zeros": zeros, "csum": csum, "bits": 4, "group_size": 32}
    given |= {"activation_bits": 4} | {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=message):
        ops_asym.quant_matmul_asym(**given)


def test_no_columns_and_half_of_a_pair_are_named():
    with pytest.raises(ValueError, match="x: shape .*1 column or more"):
        ops_asym.quantize_rows_asym(torch.zeros(3, 0, device=DEVICE), 4)
    xq, scale, shift = ops_asym.quantize_rows_asym(rows_of("both", 3, 64), 4)
    w, scales = torch.zeros(17, 64, dtype=torch.int8, device=DEVICE), torch.ones(1, 17, 1, device=DEVICE)
    with pytest.raises(ValueError, match="wsum: None; expected a tensor"):
        ops_asym.ops_a8.a8_matmul(xq, scale, w, scales, 64, torch.float32, shift=shift)


def test_a_broken_row_stays_broken_and_no_rows_are_no_launch():
    _, words, scales, zeros = weight(4, 17, 256, 128, "each")
    csum = ops_asym.code_sums(words, zeros, 4, 128, 256)
    x = rows_of("both", 5, 256)
    x[2, 7] = float("inf")
    xq, x_scale, point = launch_quantize_rows_asym(x, 4, None, 4)
    launched = launch_a8_packed(xq, x_scale, words, scales, zeros, 4, 128, 256, torch.float32, shift=point, csum=csum)
    for y in (launched, ops_asym.quant_matmul_asym(x, words, scales, zeros, csum, 4, 128, 4)):
        assert bool(y[2].isnan().all()) and bool(y[[0, 1, 3, 4]].isfinite().all())
    assert ops_asym.quant_matmul_asym(x[:0], words, scales, zeros, csum, 4, 128, 4).shape == (0, 17)
    assert launch_quantize_rows_asym(x[:0], 4, None)[0].shape == (0, 256)
