"""The product of 8-bit rows with packed codes: the Triton launcher against the reference, over shapes, groups and zeros."""

import pytest
import torch
from a8_operands import DEVICE, activations, distance, generator, weight

from qzo_kernels import ops_a8, reference_a8

pytest.importorskip("triton")
from qzo_kernels.a8_packed import launch_a8_packed  # noqa: E402
from qzo_kernels.a8_rows import launch_group_sums, launch_quantize_rows  # noqa: E402

# bits, variants, rows each, N, K, group size, bias, asymmetric, columns, warps
PRODUCTS = [
    (4, 1, 2, 17, 128, 128, False, False, 16, 4),
    (4, 2, 5, 70, 300, 128, True, False, 16, 4),
    (4, 3, 17, 129, 1000, 256, False, True, 32, 4),
    (4, 1, 63, 63, 257, 257, True, True, 64, 4),
    (4, 1, 33, 130, 640, 128, False, False, 32, 8),
    (8, 2, 3, 65, 300, 128, True, True, 16, 4),
    (8, 1, 257, 64, 384, 1 << 40, False, True, 128, 4),
    (8, 5, 1, 33, 1728, 128, False, False, 16, 4),
]


@pytest.mark.parametrize("bits,variants,rows,n,cols,group_size,bias,asymmetric,columns,warps", PRODUCTS)
def test_launcher_equals_reference(bits, variants, rows, n, cols, group_size, bias, asymmetric, columns, warps):
    _, codes, scales, zeros = weight(bits, n, cols, min(group_size, cols), "each" if asymmetric else "none")
    seen = torch.stack([scales * (1 + 0.1 * v) for v in range(variants)])
    x = activations(rows * variants, cols)
    shift = torch.randn(n, generator=generator(n)).to(DEVICE) if bias else None
    xq, x_scale = launch_quantize_rows(x, "int8", bits)
    sums = launch_group_sums(xq, group_size if group_size < cols else xq.shape[1]) if asymmetric else None
    y = launch_a8_packed(xq, x_scale, codes, seen, bits, group_size, cols, torch.float32, shift, zeros, sums, columns, warps)
    plain, scale = reference_a8.quantize_rows(x, "int8")
    w = torch.empty(n, cols, dtype=torch.int8, device=DEVICE)
    reference_a8.unpack(codes, zeros, bits, group_size, w)
    right = reference_a8.a8_matmul(plain, scale, w, seen, group_size, torch.float64, shift, zeros if bits == 8 else None)
    assert torch.equal(scale, x_scale) and distance(y, right) < 2e-6


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
    assert takes("int8", 4, 128, 640) and takes("int8", 8, 1 << 40, 300)
    assert not (takes("fp8", 4, 128, 640) or takes("int8", 3, 128, 640) or takes("int8", 4, 64, 640))
