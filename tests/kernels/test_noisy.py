"""Quantized noise on codes: the Triton launchers against the reference, and the operators."""

import pytest
import torch
from a8_operands import COMPILED, DEVICE, KINDS, activations, distance, generator, weight

from qzo_kernels import ops_noisy, reference, reference_noisy
from qzo_kernels.ops_noisy import CodeNoise
from qzo_kernels.reference_codes import quantized_normal

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from qzo_kernels import noisy  # noqa: E402
from qzo_kernels.noisy import launch_code_noise, launch_noisy_a8, launch_noisy_dequantize  # noqa: E402

SEED, STEP, UID = -3 << 40 | 5, 70000, 0x9ABCDEF1
# Triton's interpreter truncates fp32 to bf16 where compiled code rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * COMPILED


def states(*directions: int) -> torch.Tensor:
    return torch.tensor([[SEED, STEP, direction] for direction in directions], device=DEVICE)


def sizes(count: int) -> torch.Tensor:
    """eps of both signs, no two of one size."""
    return torch.tensor([(0.37 + v / 8) * (-1) ** v for v in range(count)], device=DEVICE)


DRAWS = [(1, 1, 2, 1), (17, 130, 3, 2), (3, 257, 8, 1), (5, 16, 4, 2), (130, 17, 5, 1), (2, 17, 2, 2), (1, 1000, 6, 2), (7, 300, 4, 1)]


@pytest.mark.parametrize("rows,cols,noise_bits,stream", DRAWS)
def test_noise_equals_reference(rows, cols, noise_bits, stream):
    """Bit for bit, in int8 and in e4m3 where it holds the levels; the rows around the output stay as they were."""
    expected = quantized_normal((rows, cols), SEED, STEP, 3, UID, stream, noise_bits, DEVICE)
    for dtype in [torch.int8] + [torch.float8_e4m3fn] * (noise_bits <= 5):
        around = torch.full((rows + 2, cols), 99, dtype=torch.int8, device=DEVICE)
        launch_code_noise(around[1:-1].view(dtype), states(3), UID, noise_bits, stream)
        assert torch.equal(around[1:-1], expected.to(dtype).view(torch.int8))
        assert around[0].unique().tolist() == around[-1].unique().tolist() == [99]


@triton.jit
def _e4m3_kernel(p):
    i = tl.arange(0, 32)
    tl.store(p + i, noisy._e4m3(i - 15), mask=i < 31)


def test_every_level_in_e4m3():
    levels = torch.zeros(31, dtype=torch.int32, device=DEVICE)
    _e4m3_kernel[(1,)](levels)
    assert levels.to(torch.uint8).view(torch.float8_e4m3fn).float().tolist() == list(range(-15, 16))


# bits, noise bits, rows, cols, group size, zeros
WEIGHTS = [
    (2, 2, 1, 1, 1, "each"),
    (2, 4, 4, 130, 32, "none"),
    (2, 3, 1, 300, 128, "each"),
    (3, 3, 3, 257, 20, "each"),
    (3, 8, 3, 17, 4, "none"),
    (3, 4, 33, 17, 8, "same"),
    (3, 2, 2, 300, 128, "none"),
    (4, 4, 9, 300, 128, "none"),
    (4, 8, 1, 17, 1 << 40, "each"),
    (4, 2, 17, 30, 5, "each"),
    (4, 3, 2, 1000, 64, "each"),
    (8, 8, 5, 257, 257, "each"),
    (8, 2, 1, 1, 32, "none"),
    (8, 4, 5, 300, 12, "none"),
    (8, 3, 17, 16, 16, "same"),
]


@pytest.mark.parametrize("bits,noise_bits,rows,cols,group_size,which", WEIGHTS)
def test_weight_equals_reference(bits, noise_bits, rows, cols, group_size, which):
    """Every dtype, bit for bit: the sum in fp32, rounded once; the rows around the output keep their NaN."""
    _, codes, scales, zeros = weight(bits, rows, cols, min(group_size, cols), which)
    tail = (states(3), sizes(2)[1:], UID, noise_bits)
    expected = reference_noisy.noisy_weight(codes, scales, zeros, bits, group_size, cols, *tail)[0]
    for dtype in DTYPES if COMPILED else [DTYPES[rows % 2]]:
        around = torch.full((rows + 2, cols), float("nan"), dtype=dtype, device=DEVICE)
        launch_noisy_dequantize(codes, scales, zeros, bits, group_size, around[1:-1], *tail)
        assert torch.equal(around[1:-1], expected.to(dtype))
        assert bool(around[0].isnan().all()) and bool(around[-1].isnan().all())


def test_weight_without_noise():
    """eps = 0: the bits of `dequantize`; else others."""
    _, codes, scales, zeros = weight(4, 5, 17, 8, "each")
    expected = reference.dequantize(codes, scales, zeros, 4, 8, 17, torch.float32)
    for eps in (0.0, 0.5):
        out = torch.full((5, 17), float("nan"), device=DEVICE)
        launch_noisy_dequantize(codes, scales, zeros, 4, 8, out, states(3), torch.tensor([eps], device=DEVICE), UID, 4)
        assert torch.equal(out, expected) == (eps == 0)


# kind, bits, noise bits, variants, paired, rows each, N, K, group size, zeros, bias
PRODUCTS = [
    ("int8", 2, 4, 1, False, 1, 17, 130, 32, "each", False),
    ("int8", 3, 8, 4, True, 3, 17, 130, 64, "none", True),
    ("int8", 3, 2, 2, False, 17, 9, 300, 1 << 40, "each", False),
    ("int8", 4, 4, 2, True, 5, 70, 130, 128, "none", True),
    ("int8", 4, 3, 3, False, 33, 1, 257, 96, "each", False),
    ("int8", 8, 8, 2, True, 17, 9, 300, 128, "each", True),
    ("int8", 8, 4, 1, False, 130, 17, 1, 1, "none", False),
    ("int8", 8, 2, 3, False, 1, 17, 17, 32, "each", False),
    ("fp8", 2, 5, 2, True, 1, 33, 257, 32, "each", True),
    ("fp8", 3, 3, 1, False, 17, 17, 300, 300, "none", False),
    ("fp8", 4, 4, 4, True, 5, 17, 300, 128, "each", False),
    ("fp8", 8, 2, 3, False, 3, 17, 130, 64, "none", True),
]
PRODUCT = "kind,bits,noise_bits,variants,paired,rows,n,cols,group_size,which,bias"


def operands(kind, bits, variants, paired, rows, n, cols, group_size, which, bias):
    """(x, weight arguments, bias, state, eps)."""
    _, codes, scales, zeros = weight(bits, n, cols, min(group_size, cols), which)
    if kind == "fp8" and bits == 8:
        codes &= 0x6F6F6F6F | -(1 << 31)  # no NaN
    shift = torch.randn(n, generator=generator(n)).to(DEVICE) if bias else None
    state = states(*(v // 2 if paired else v for v in range(variants)))
    x = activations(rows * variants, cols)
    x[:: max(rows, 2)] = 1.0  # a product of one element is not all zeros
    return x, (codes, scales, zeros, bits, group_size), shift, state, sizes(variants)


@pytest.mark.parametrize(PRODUCT, PRODUCTS)
def test_product_of_8_bits_equals_reference(
    poison, kind, bits, noise_bits, variants, paired, rows, n, cols, group_size, which, bias
):  # fmt: skip
    """Pairs draw the noise of their first variant; scratch is used as far as two bytes per weight."""
    if kind not in KINDS:
        return
    x, given, shift, state, eps = operands(kind, bits, variants, paired, rows, n, cols, group_size, which, bias)
    right = reference_noisy.noisy_matmul_a8(x, *given, kind, shift, state, eps, UID, noise_bits)
    quiet = reference_noisy.noisy_matmul_a8(x, *given, kind, shift, state, torch.zeros_like(eps), UID, noise_bits)
    if paired:
        state[1::2] = -1
    scratch = torch.full((2 * n * cols + 3,), 77, dtype=torch.uint8, device=DEVICE)
    y = launch_noisy_a8(x, *given, kind, shift, state, eps, UID, noise_bits, paired, scratch)
    # An fp8 tensor core keeps about 13 bits of a partial sum.
    limit = 2e-3 if kind == "fp8" and COMPILED else 2e-6
    assert y.dtype == x.dtype and distance(y, right) < limit < 2 * limit < distance(quiet, right)
    assert scratch[-3:].tolist() == [77] * 3 and (n * cols < 100 or int((scratch == 77).sum()) < n * cols // 4)


def test_scratch_of_8_bits_is_made_and_checked():
    x, given, shift, state, eps = operands("int8", 4, 2, True, 3, 17, 130, 32, "each", True)
    tail = ("int8", shift, state, eps, UID, 4, True)
    scratch = torch.zeros(2 * 17 * 130, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(launch_noisy_a8(x, *given, *tail, None), launch_noisy_a8(x, *given, *tail, scratch))
    with pytest.raises(ValueError, match="scratch: .*expected uint8, 4420 or more"):
        launch_noisy_a8(x, *given, *tail, scratch[1:])


@pytest.mark.parametrize("bits,variants,bias,with_scratch", [(4, 1, False, False), (3, 4, True, True), (8, 3, True, False)])
def test_product_through_weights(poison, bits, variants, bias, with_scratch):
    """What CUDA does with 16-bit activations: a weight of x's dtype per variant, in scratch if given."""
    x, given, shift, state, eps = operands(None, bits, variants, False, 5, 17, 130, 32, "each", bias)
    noise = CodeNoise(state, eps, UID, 4)
    scratch = torch.full((4 * 17 * 130,), 255, dtype=torch.uint8, device=DEVICE) if with_scratch else None
    y = ops_noisy._through_weights(x, *given, shift, noise, scratch)
    weights = reference_noisy.noisy_weight(*given, 130, *noise[:4])
    right = torch.cat([part @ w.t() for part, w in zip(x.double().chunk(variants), weights.double(), strict=True)])
    assert distance(y, right if shift is None else right + shift) < 2e-6
    assert scratch is None or torch.equal(scratch.view(torch.float32).view(17, 130), weights[-1])


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_noisy_matmul_is_the_equation(kind):
    """Of x [2, 3, 5, K]: a product of exact numbers with the weight under each variant's noise."""
    _, codes, scales, zeros = weight(4, 17, 130, 32, "each")
    q, group = weight(4, 17, 130, 32, "each")[0], torch.arange(130, device=DEVICE) // 32
    x = torch.randint(-7, 8, (2, 3, 5, 130), generator=generator(1)).float().to(DEVICE)
    x[..., 0] = 127.0 if kind == "int8" else 448.0  # the scale of a row is 1, so rounding changes nothing
    noise = CodeNoise(states(0, 5), sizes(2), UID, 4)
    bias = torch.randn(17, generator=generator(2)).to(DEVICE)
    y = ops_noisy.noisy_matmul(x, codes, scales, zeros, 4, 32, bias, noise, kind)
    for v, direction in enumerate((0, 5)):
        u = quantized_normal((17, 130), SEED, STEP, direction, UID, 1, 4, DEVICE)
        w = (q.double() - zeros[:, group].double() + noise.eps[v].double() * u) * scales[:, group].double()
        assert distance(y[v], x[v].double() @ w.t() + bias.double()) < (2e-3 if kind == "fp8" and COMPILED else 2e-6)


def test_code_noise():
    """With and without `out`, of a state of one row or of one dimension."""
    expected = quantized_normal((3, 17), SEED, STEP, 2, UID, 2, 4, DEVICE)
    assert torch.equal(ops_noisy.code_noise(3, 17, states(2), UID, 4, 2), expected)
    out = torch.empty(3, 17, dtype=torch.float8_e4m3fn, device=DEVICE)
    assert ops_noisy.code_noise(3, 17, states(2)[0], UID, 4, 2, out) is out and torch.equal(out.float(), expected.float())


def test_operators_satisfy_torch():
    checks = ("test_schema", "test_faketensor")
    x, (codes, scales, zeros, *shape), shift, state, eps = operands("int8", 4, 2, True, 3, 17, 130, 32, "each", True)
    out = torch.empty(17, 130, dtype=torch.int8, device=DEVICE)
    torch.library.opcheck(torch.ops.qzo.code_noise, (out, state[0], UID, 4, 1), test_utils=checks)
    dense = torch.zeros(17, 130, device=DEVICE)
    given = (codes, scales, zeros, dense, state[:1], eps[:1], *shape, UID, 4)
    torch.library.opcheck(torch.ops.qzo.noisy_dequantize, given, test_utils=checks)
    torch.ops.qzo.noisy_dequantize(*given)
    assert torch.equal(dense, reference_noisy.noisy_weight(codes, scales, zeros, *shape, 130, state[:1], eps[:1], UID, 4)[0])
    for scratch in (None, torch.zeros(2 * 17 * 130, dtype=torch.uint8, device=DEVICE)):
        arguments = (x, codes, scales, zeros, shift, state, eps, scratch, *shape, "int8", UID, 4, True)
        torch.library.opcheck(torch.ops.qzo.noisy_a8, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"out": torch.zeros(3, 17)}, "out: torch.float32 .*int8"),
        ({"out": torch.zeros(17, 3, dtype=torch.int8).t()}, "out: strides"),
        ({"out": torch.zeros(3, 16, dtype=torch.int8)}, r"out: .* \(3, 16\)"),
        ({"out": torch.zeros(3, 17).to(torch.float8_e4m3fn), "noise_bits": 6}, "noise_bits = 6: expected at most 5"),
        ({"state": torch.zeros(2, 3, dtype=torch.int64)}, r"state: .* \(2, 3\)"),
        ({"state": torch.zeros(3)}, "state: torch.float32"),
        ({"uid": 1 << 32}, "uid: 4294967296"),
        ({"noise_bits": 1}, "noise_bits = 1"),
        ({"noise_bits": 9}, "noise_bits = 9"),
        ({"stream": 3}, "stream = 3"),
        ({"stream": 0}, "stream = 0"),
    ],
)
def test_bad_arguments_of_code_noise_are_named(change, message):
    arguments = {"state": states(1), "uid": 1, "noise_bits": 4, "stream": 1, **change}
    with pytest.raises(ValueError, match=message):
        ops_noisy.code_noise(3, 17, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"eps": torch.zeros(0)}, "eps: .*at least 1"),
        ({"eps": torch.zeros(2, dtype=torch.float64)}, "eps: torch.float64"),
        ({"state": torch.zeros(3, 3, dtype=torch.int64)}, r"state: .* \(3, 3\)"),
        ({"uid": -1}, "uid: -1"),
        ({"noise_bits": 9}, "noise_bits = 9"),
        ({"noise_bits": 6, "kind": "fp8"}, "noise_bits = 6: expected at most 5 with fp8"),
        ({"eps": torch.zeros(3), "state": torch.zeros(3, 3, dtype=torch.int64), "paired": True}, "eps: 3 variants; .*even"),
        ({"eps": torch.zeros(3), "state": torch.zeros(3, 3, dtype=torch.int64)}, "x: 4 rows; .*3 variants"),
        ({"kind": "int4"}, "kind = 'int4'"),
        ({"kind": "int8", "group_size": 20, "scales": torch.ones(17, 7)}, "group_size = 20: 8-bit"),
        ({"scales": torch.ones(17, 4)}, "scales: "),
        ({"bias": torch.ones(16)}, "bias: "),
    ],
)
def test_bad_arguments_of_the_product_are_named(change, message):
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    _, codes, scales, _ = weight(4, 17, 130, 32, "none")
    noise = CodeNoise(states(0, 1), sizes(2), UID, 4)._replace(**{k: change.pop(k) for k in CodeNoise._fields if k in change})
    given = {"codes": codes, "scales": scales, "zeros": None, "bits": 4, "group_size": 32, "bias": None, **change}
    with pytest.raises(ValueError, match=message):
        ops_noisy.noisy_matmul(torch.ones(4, 130, device=DEVICE), **given, noise=noise)


def test_zeros_of_e4m3_codes_are_named():
    _, codes, scales, zeros = weight(8, 17, 130, 32, "each")
    with pytest.raises(ValueError, match="zeros: given with e4m3"):
        noise = CodeNoise(states(0), sizes(1), UID, 4)
        ops_noisy.noisy_matmul(torch.ones(4, 130, device=DEVICE), codes, scales, zeros, 8, 32, None, noise, "fp8")
