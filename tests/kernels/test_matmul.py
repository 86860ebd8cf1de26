"""The fused matmul's launcher against the reference: bits × group sizes × odd shapes × variants of the noise."""

from functools import partial

import pytest
import torch

from qzo_kernels import dispatch, ops, reference
from qzo_kernels.pack import tile_codes

pytest.importorskip("triton")
from qzo_kernels import matmul  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter's bf16 arithmetic is wrong; compiled code takes no fp32.
DTYPES = [torch.float16] + ([torch.bfloat16] if CUDA else [torch.float32])
# Rounding of the output and, on the tensor core, of nothing else: codes are exact.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}
SMALL, TALL, SPLIT = dispatch.Config(64, 16, 1, 4, 3), dispatch.Config(64, 64, 1, 4, 3), dispatch.Config(64, 32, 3, 4, 3)

# bits, N, K, group size, symmetric, M, variants (0: no noise), bias, config
CASES = [
    (4, 1, 8, 32, True, 1, 0, False, SMALL),
    (4, 65, 257, 128, True, 3, 1, True, SMALL),
    (4, 17, 1728, 32, False, 17, 1, False, SPLIT),
    (4, 130, 384, 384, False, 63, 3, True, TALL),
    (4, 63, 300, 128, True, 64, 2, False, SPLIT),
    (4, 70, 640, 64, False, 257, 1, False, TALL),
    (4, 33, 172, 96, True, 30, 15, False, SMALL),
    (2, 3, 172, 64, False, 17, 1, True, SPLIT),
    (2, 64, 257, 257, True, 66, 2, False, TALL),
    (2, 65, 600, 32, True, 3, 3, False, SMALL),
    (3, 63, 257, 128, False, 1, 1, False, SPLIT),
    (3, 130, 172, 32, True, 6, 2, True, SMALL),
    (3, 17, 384, 384, True, 63, 0, False, TALL),
    (8, 65, 172, 64, True, 17, 1, False, SMALL),
    (8, 3, 640, 128, False, 64, 4, True, SPLIT),
    (8, 63, 257, 257, False, 257, 1, False, TALL),
    (4, 65, 640, 128, True, 16, 16, True, SMALL),  # a variant per row, all in one tile
    (4, 130, 300, 64, False, 40, 10, False, TALL),  # ten slots of four rows, of sixteen
    (2, 63, 257, 128, True, 96, 6, False, SPLIT),  # tiles of two slots
    (4, 16, 13824, 128, True, 2, 2, False, SPLIT),  # 108 groups
    (4, 16, 2000, 32, True, 4, 2, False, SMALL),  # 63 groups
    (4, 16, 4224, 32, True, 4, 2, False, SPLIT),  # 132 groups: more than one Philox call of signs
]
CASE = "bits,rows,cols,group_size,symmetric,m,variants,bias,config"


def make(bits, rows, cols, group_size, symmetric, m, variants, bias, dtype, relative=True, gaussian=False):
    """(x, arguments of launch_matmul after x, before the config)."""
    g = torch.Generator().manual_seed(bits * rows + cols + m)
    groups = -(-cols // group_size)
    codes = tile_codes(torch.randint(0, 1 << bits, (rows, cols), generator=g, dtype=torch.uint8), bits).to(DEVICE)
    scales = (torch.rand(rows, groups, generator=g) * 0.01 + 0.005).to(DEVICE)
    zeros = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8).to(DEVICE)
    x = torch.randn(m, cols, generator=g).to(DEVICE, dtype)
    offset = torch.randn(rows, generator=g).to(DEVICE, dtype) if bias else None
    noise = None
    if variants:
        state = torch.tensor([[-7 << 33, 70000, v // 2] for v in range(variants)], device=DEVICE)
        eps = torch.tensor([0.2 * (-1) ** v * (v != 4) for v in range(variants)], device=DEVICE)
        noise = ops.Noise(state, eps, 0x9ABCDEF1, 5e-3, relative, gaussian)
    return x, (codes, scales, zeros, bits, group_size, offset, noise)


def expected(x, codes, scales, zeros, bits, group_size, bias, noise) -> torch.Tensor:
    """In fp32 from the same operands."""
    seen = scales[None] if noise is None else reference.perturb(scales, *noise)
    return reference.quant_matmul(x.float(), codes, seen, zeros, bits, group_size, None if bias is None else bias.float())


def assert_close(y: torch.Tensor, x: torch.Tensor, arguments: tuple) -> None:
    right = expected(x, *arguments)
    assert float((y.float() - right).norm() / right.norm()) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(CASE, CASES)
def test_launcher_equals_reference(poison, bits, rows, cols, group_size, symmetric, m, variants, bias, config, dtype):
    x, arguments = make(bits, rows, cols, group_size, symmetric, m, variants, bias, dtype)
    y = matmul.launch_matmul(x, *arguments, config)
    assert y.shape == (m, rows) and y.dtype == dtype
    assert_close(y, x, arguments)


@pytest.mark.parametrize("relative,gaussian", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("variants", [1, 3])
def test_every_noise(relative, gaussian, variants):
    x, arguments = make(4, 65, 257, 128, True, 6, variants, False, DTYPES[-1], relative, gaussian)
    assert_close(matmul.launch_matmul(x, *arguments, SMALL), x, arguments)


@pytest.mark.parametrize("config", [SMALL, TALL, SPLIT])
def test_eps_of_zero_is_no_noise_and_variants_do_not_mix(config):
    """Bit for bit: rows of one variant whatever its neighbours are; compiled, also eps = 0 against no noise.

    (The interpreter's products are numpy's, whose last bits depend on the shape of a tile.)
    """
    x, arguments = make(4, 65, 1000, 128, True, 12, 3, False, DTYPES[-1])
    noise = arguments[-1]
    still = noise._replace(eps=torch.zeros_like(noise.eps))
    quiet = matmul.launch_matmul(x, *arguments[:-1], None, config)
    same = torch.equal if CUDA else partial(torch.allclose, atol=1e-5)
    assert same(matmul.launch_matmul(x, *arguments[:-1], still, config), quiet)
    together = matmul.launch_matmul(x, *arguments, config)
    for v in range(3):
        mixed = noise._replace(eps=torch.where(torch.arange(3, device=DEVICE) == v, noise.eps, 0.0))
        part = slice(4 * v, 4 * v + 4)
        assert torch.equal(matmul.launch_matmul(x, *arguments[:-1], mixed, config)[part], together[part])


def test_strides_and_repeats():
    """x with a row stride, an odd address and an odd width; the same bits twice, and the tickets left at zero."""
    x, arguments = make(4, 65, 260, 32, False, 5, 1, True, DTYPES[-1])
    wide = torch.full((5, 267), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[:, 3:263] = x
    y = matmul.launch_matmul(wide[:, 3:263], *arguments, SPLIT)
    assert torch.equal(y, matmul.launch_matmul(x, *arguments, SPLIT))
    assert torch.equal(y, matmul.launch_matmul(x, *arguments, SPLIT))
    assert not any(bool(ticket.any()) for ticket in matmul._tickets.values())


@pytest.mark.parametrize("variants", [0, 1, 2])
def test_routes_agree(variants):
    x, (codes, scales, zeros, bits, group_size, bias, noise) = make(4, 65, 257, 128, False, 6, variants, True, DTYPES[0])
    right = expected(x, codes, scales, zeros, bits, group_size, bias, noise)
    scratch = torch.empty(65 * 257 * 2, dtype=torch.uint8, device=DEVICE)
    for route in (*ops.ROUTES, None):
        y = ops.quant_matmul(x.view(2, 3, -1), codes, scales, zeros, bits, group_size, bias, noise, scratch, route)
        assert y.shape == (2, 3, 65) and float((y.view(6, -1).float() - right).norm() / right.norm()) < 2e-3


def test_operator():
    x, (codes, scales, zeros, bits, group_size, bias, noise) = make(4, 65, 256, 128, False, 6, 2, True, DTYPES[0])
    flat = (x, codes, scales, zeros, bias, noise.state, noise.eps, bits, group_size, *noise[2:])
    torch.library.opcheck(torch.ops.qzo.fused_matmul, flat, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("route", ops.ROUTES)
def test_compiles_whole(route):
    """torch.compile sees operators with known shapes, and no break of its graph."""
    x, (codes, scales, zeros, bits, group_size, bias, noise) = make(4, 65, 256, 128, False, 6, 2, True, DTYPES[0])

    def call(x):
        return ops.quant_matmul(x, codes, scales, zeros, bits, group_size, bias, noise, route=route) * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))


def test_what_the_kernel_does_not_take_is_named():
    x, arguments = make(4, 8, 100, 20, False, 2, 0, False, DTYPES[0])
    with pytest.raises(ValueError, match="group_size = 20"):
        matmul.launch_matmul(x, *arguments, SMALL)
    x, arguments = make(8, 8, 100, 32, False, 2, 0, False, DTYPES[0])
    with pytest.raises(ValueError, match="group_size = 32"):
        matmul.launch_matmul(x, *arguments, SMALL)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(4, 96, dtype=torch.float64)}, "x: torch.float64"),
        ({"x": torch.zeros(3, 96)}, "x: 3 rows; expected a multiple of the 2 variants"),
        ({"x": torch.zeros(4, 300)}, r"codes: .* \(8, 16\)"),
        ({"bias": torch.zeros(7)}, r"bias: .* \(7,\)"),
        ({"zeros": torch.zeros(8, 2, dtype=torch.uint8)}, "zeros: "),
        ({"route": "slow"}, "route: 'slow'"),
        ({"scratch": torch.zeros(10, dtype=torch.uint8)}, "scratch: torch.uint8 of 10"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, (codes, scales, zeros, bits, group_size, _, noise) = make(4, 8, 96, 32, False, 4, 2, False, torch.float32)
    given = {"x": x, "codes": codes, "scales": scales, "zeros": zeros, "bits": bits, "group_size": group_size, "noise": noise}
    given |= {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.quant_matmul(**given)


def test_table_sends_small_products_to_the_fused_kernel():
    """Only the choice, on every device: shapes decide, and nothing else."""
    row = dispatch._row
    assert [row(rows) is None for rows in (1, 16, 17, 64, 256, 384, 385, 4096)] == [False] * 6 + [True] * 2
    x = torch.zeros(64, 256)
    assert dispatch.config_of(x, 5120, None).splits > 1
    several = ops.Noise(None, torch.empty(16), 0, 0.0, False, False)
    found = [dispatch.config_of(torch.empty(256, k, device="meta"), 5120, n)[:3] for n in (None, several) for k in (5120, 13824)]
    assert found == [(64, 64, 1), (64, 128, 3), (64, 64, 1), (64, 64, 2)]
    assert dispatch.route_of(x, 4, 128, None) == ("dequantize" if not x.is_cuda else "fused")
    assert dispatch.part_width(4, 96, 960) == 32 and dispatch.part_width(8, 32, 960) == 0 and dispatch.part_width(3, 5, 5) == 128
    assert [dispatch.slots_of(*given) for given in ((4, 16, 64), (1, 64, 16), (1, 64, 32), (3, 16, 64), (32, 2, 64), (8, 2, 16))] == [16, 16, 1, 1, 1, 2]
