"""The product of 8-bit rows with packed codes: the Triton launcher against the reference, over shapes, groups and zeros."""

import pytest
import torch
from a8_operands import COMPILED, DEVICE, KINDS, activations, distance, generator, weight

from qzo_kernels import ops, ops_a8, reference, reference_a8

pytest.importorskip("triton")
from qzo_kernels.a8_packed import Tile, choose_tile, launch_a8_packed  # noqa: E402
from qzo_kernels.a8_rows import launch_quantize_rows  # noqa: E402

# kind, bits, variants, rows each, N, K, group size, bias, asymmetric, columns, parts
PRODUCTS = [
    ("int8", 4, 1, 2, 17, 128, 128, False, False, 16, 1),
    ("int8", 4, 2, 5, 70, 300, 128, True, False, 16, 1),
    ("int8", 4, 3, 17, 129, 1000, 256, False, True, 32, 1),
    ("int8", 4, 1, 63, 63, 257, 257, True, True, 64, 1),
    ("int8", 4, 1, 33, 130, 640, 128, False, False, 32, 2),
    ("int8", 8, 2, 3, 65, 300, 128, True, True, 16, 1),
    ("int8", 8, 1, 257, 64, 384, 1 << 40, False, True, 128, 2),
    ("int8", 8, 5, 1, 33, 1728, 128, False, False, 16, 1),
    ("fp8", 4, 1, 3, 70, 300, 128, True, False, 16, 1),
    ("fp8", 4, 2, 63, 129, 1000, 256, False, True, 64, 2),
    ("fp8", 4, 1, 257, 64, 384, 1 << 40, False, True, 128, 1),
    ("fp8", 8, 3, 17, 33, 640, 128, True, False, 32, 1),
    ("fp8", 8, 1, 2, 130, 1728, 1 << 40, False, False, 16, 1),
]


@pytest.mark.parametrize("kind,bits,variants,rows,n,cols,group_size,bias,asymmetric,columns,parts", PRODUCTS)
def test_launcher_equals_reference(poison, kind, bits, variants, rows, n, cols, group_size, bias, asymmetric, columns, parts):
    if kind not in KINDS:
        return
    _, codes, scales, zeros = weight(bits, n, cols, min(group_size, cols), "each" if asymmetric else "none")
    if kind == "fp8" and bits == 8:
        codes &= 0x6F6F6F6F | -(1 << 31)  # no NaN
    noise = None
    if variants > 1:
        state = torch.tensor([[7, 8, v] for v in range(variants)], device=DEVICE)
        eps = torch.tensor([0.1 * (-1) ** v for v in range(variants)], device=DEVICE)
        noise = ops.Noise(state, eps, 1 << 31, 1e-3, n % 2 == 0, n == 65)
    seen = scales[None] if noise is None else reference.perturb(scales, *noise)
    x = activations(rows * variants, cols)
    shift = torch.randn(n, generator=generator(n)).to(DEVICE) if bias else None
    xq, x_scale = launch_quantize_rows(x, kind, bits)
    tile = Tile(columns, parts, 4, 3)
    y = launch_a8_packed(xq, x_scale, codes, scales, zeros, bits, group_size, cols, torch.float32, shift, noise, tile)
    plain, scale = reference_a8.quantize_rows(x, kind)
    w = torch.empty(n, cols, dtype=xq.dtype, device=DEVICE)
    reference_a8.unpack(codes, zeros, bits, group_size, w)
    right = reference_a8.a8_matmul(plain, scale, w, seen, group_size, torch.float64, shift, zeros if bits == 8 else None)
    # An fp8 tensor core keeps about 13 bits of a partial sum.
    assert torch.equal(scale, x_scale) and distance(y, right) < (2e-3 if kind == "fp8" and COMPILED else 2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_order_of_the_columns(bits):
    """Every column is where pack.py's words, read byte by byte, have its code; the rest of the last block is 0."""
    x = torch.arange(1, 173, dtype=torch.float32, device=DEVICE)[None] / 172
    xq, _ = launch_quantize_rows(x, "int8", bits)
    expected = torch.zeros(256, dtype=torch.int8)
    plain = reference_a8.quantize_rows(x.cpu(), "int8")[0][0]
    for k in range(172):
        p, v, t, h = k % 128 // (8 * bits), k // 8 % bits, k // 2 % 4, k % 2
        place = 32 * v + 16 * (p % 2) + 4 * t + 2 * h + p // 2 if bits == 4 else 16 * v + 4 * t + 2 * h + p
        expected[k // 128 * 128 + place] = plain[k]
    assert torch.equal(xq[0].cpu(), expected)


def test_what_goes_packed():
    takes = ops_a8.takes_packed
    assert takes(4, 128, 640) and takes(8, 1 << 40, 300)
    assert not (takes(3, 128, 640) or takes(4, 64, 640))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_operator_equals_its_parts(kind, bits):
    """Packed or through unpacked weights: the same sums, but for fp8's order."""
    _, words, scales, zeros = weight(bits, 63, 300, 128, "none" if kind == "fp8" else "each")
    words &= 0x6F6F6F6F if kind == "fp8" and bits == 8 else -1
    x = activations(8, 300, torch.float16).clamp(-100, 100)
    y = ops_a8.quant_matmul_a8(x, words, scales, zeros, bits, 128, kind)
    w = ops_a8.unpack(words, zeros, bits, 128, 300, kind)
    parts = ops_a8.a8_matmul(*ops_a8.quantize_rows(x, kind), w, scales[None], 128, x.dtype, None, zeros if bits == 8 else None)
    assert distance(y, parts) < 1e-3


def test_choice_of_a_tile():
    """By shapes alone: wide tiles where there are many of them."""
    found = [choose_tile(rows, 5120, 1)[:2] for rows in (1, 32, 64, 200, 1024, 4096)]
    assert found == [(16, 1), (32, 1), (64, 1), (128, 1), (128, 1), (128, 2)]


def test_other_groups_are_named():
    _, words, scales, zeros = weight(4, 17, 256, 64, "each")
    xq, x_scale = launch_quantize_rows(activations(2, 256), "int8", 4)
    with pytest.raises(ValueError, match="group_size = 64: packed codes"):
        launch_a8_packed(xq, x_scale, words, scales, zeros, 4, 64, 256, torch.float32)
