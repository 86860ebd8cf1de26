"""The product of 8-bit rows and weights: the reference against the equation, the Triton launcher against the reference."""

import pytest
import torch
from a8_operands import COMPILED, DEVICE, KINDS, activations, distance, generator, operands, zeros_and_sums

from qzo_kernels import reference_a8

pytest.importorskip("triton")
from qzo_kernels.a8_matmul import TILES, Tile, choose_tile, launch_a8_matmul  # noqa: E402
from qzo_kernels.a8_rows import launch_quantize_rows  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("asymmetric,group_size", [(False, 32), (True, 64), (False, 172), (True, 500)])
def test_matmul_reference_is_the_equation(kind, asymmetric, group_size):
    xq, x_scale, wq, scales = operands(kind, 2, 3, 17, 172, group_size)
    asymmetric = asymmetric and kind == "int8"
    zeros = zeros_and_sums(xq, 17, group_size)[0] if asymmetric else None
    bias = torch.randn(17, generator=generator(1)).to(DEVICE)
    group = torch.arange(172, device=DEVICE) // group_size
    w = wq.double() + (128 - zeros[:, group].double() if asymmetric else 0)
    expected = torch.cat([
        (part.double() * scale.double()[:, None]) @ (w * seen[:, group].double()).t()
        for part, scale, seen in zip(xq.chunk(2), x_scale.chunk(2), scales, strict=True)
    ])  # fmt: skip
    y = reference_a8.a8_matmul(xq, x_scale, wq, scales, group_size, torch.float32, bias, zeros)
    assert distance(y, expected + bias.double()) < 1e-7


# kind, variants, rows each, N, K, group size, bias, asymmetric, dtype
PRODUCTS = [
    ("int8", 1, 1, 17, 32, 32, False, False, torch.float32),
    ("int8", 2, 3, 129, 172, 32, True, True, torch.float16),
    ("int8", 1, 63, 63, 300, 64, True, False, torch.float32),
    ("int8", 3, 17, 257, 288, 96, False, True, torch.float32),
    ("int8", 1, 257, 128, 640, 128, False, False, torch.float16),
    ("int8", 2, 129, 300, 304, 256, True, True, torch.float32),
    ("int8", 2, 17, 63, 172, 172, False, True, torch.float32),
    ("int8", 1, 63, 257, 300, 1 << 40, True, False, torch.float16),
    ("int8", 5, 1, 128, 3456, 32, False, False, torch.float32),
    ("fp8", 1, 3, 17, 172, 32, True, False, torch.float32),
    ("fp8", 2, 63, 129, 300, 128, False, False, torch.float16),
    ("fp8", 1, 257, 300, 640, 64, True, False, torch.float32),
    ("fp8", 3, 17, 128, 304, 304, False, False, torch.float32),
]


def tiles_of(product: int) -> tuple[Tile, ...]:
    """All of them compiled; two under the interpreter, each tile with several products."""
    every = (*TILES.values(), Tile(128, 16, 8, 2))
    return every if COMPILED else (every[product % len(every)], every[(product + 3) % len(every)])


@pytest.mark.parametrize(
    "tile,kind,variants,rows,n,cols,group_size,bias,asymmetric,dtype",
    [pytest.param(t, *p, id=f"{t.rows}x{t.columns}-{i}") for i, p in enumerate(PRODUCTS) for t in tiles_of(i)],
)
def test_matmul_launcher_equals_reference(tile, kind, variants, rows, n, cols, group_size, bias, asymmetric, dtype):
    """Every tile; what is left of a tile of another variant, of N and of K is masked; the rows of zeros give the bias."""
    if kind not in KINDS:
        kind = "int8"
    if COMPILED and dtype == torch.float16:
        dtype = torch.bfloat16
    xq, x_scale, wq, scales = operands(kind, variants, rows, n, cols, group_size)
    x_scale = x_scale / x_scale.amax().clamp(min=1e-30) / cols / 100
    zeros, sums = zeros_and_sums(xq, n, group_size) if asymmetric else (None, None)
    shift = torch.randn(n, generator=generator(n)).to(dtype).to(DEVICE) if bias else None
    y = launch_a8_matmul(xq, x_scale, wq, scales, group_size, dtype, shift, zeros, sums, tile)
    expected = reference_a8.a8_matmul(xq, x_scale, wq, scales, group_size, torch.float64, shift, zeros)
    assert y.dtype == dtype and y.shape == expected.shape
    assert torch.equal(y[len(y) // 2], shift if bias else torch.zeros_like(y[0]))
    # An fp8 tensor core keeps about 13 bits of a partial sum.
    limit = max(TOLERANCE[dtype], 1e-3 if kind == "fp8" and COMPILED else 0)
    if bool(expected.any()):
        assert distance(y, expected) < limit


@pytest.mark.parametrize("order", [1, 3, 50])
def test_every_order_of_tiles_covers_all(order):
    n, rows = (5000, 600) if COMPILED else (600, 35)
    xq, x_scale, wq, scales = operands("int8", 2, rows, n, 64, 64)
    expected = reference_a8.a8_matmul(xq, x_scale, wq, scales, 64, torch.float64)
    y = launch_a8_matmul(xq, x_scale, wq, scales, 64, torch.float32, tile=Tile(64, 16, 4, 2, order))
    assert distance(y, expected) < 2e-6


def test_a_broken_row_stays_broken():
    x = activations(5, 64)
    x[2, 7] = float("inf")
    xq, x_scale = launch_quantize_rows(x, "int8")
    _, _, wq, scales = operands("int8", 1, 5, 17, 64, 64)
    y = launch_a8_matmul(xq, x_scale, wq, scales, 64, torch.float32)
    assert bool(y[2].isnan().all()) and bool(y[[0, 1, 3, 4]].isfinite().all())


def test_choice_of_a_tile_and_no_rows_are_no_launch():
    assert [choose_tile(rows).columns for rows in (1, 16, 32, 100, 130)] == [16, 16, 32, 64, 128]
    xq, x_scale, wq, scales = operands("int8", 1, 1, 17, 64, 64)
    assert launch_a8_matmul(xq[:0], x_scale[:0], wq, scales, 64, torch.float32).shape == (0, 17)
    assert launch_quantize_rows(activations(3, 8)[:0], "int8")[0].shape == (0, 8)


def test_weights_that_are_not_aligned_are_copied():
    """Rows of x and of the weight that begin anywhere in memory."""
    xq, x_scale, wq, scales = operands("int8", 1, 3, 17, 64, 32)
    moved = [torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape) for q in (xq, wq)]
    y = launch_a8_matmul(moved[0], x_scale, moved[1], scales, 32, torch.float32)
    assert moved[1].data_ptr() % 16 and torch.equal(y, launch_a8_matmul(xq, x_scale, wq, scales, 32, torch.float32))
