"""Tensors of more than 2³¹ elements: the last rows are what the reference makes of them."""

import pytest
import torch
from qzo_kernels import ops, ops_asym, reference, reference_qat
from qzo_kernels.pack import tile_codes, tiled_words

pytestmark = pytest.mark.gpu
LAST = 40


def random_words(rows: int, cols: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, tiled_words(cols, 4)), dtype=torch.int32, device="cuda")


@pytest.fixture(autouse=True)
def room():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free device memory")
    yield
    torch.cuda.empty_cache()


def test_dequantize():
    rows, cols = 70_000, 32_768
    codes, scales = random_words(rows, cols), torch.rand(rows, cols // 128, device="cuda")
    out = torch.full((rows, cols), float("nan"), dtype=torch.bfloat16, device="cuda")
    ops.dequantize(codes, scales, None, 4, 128, cols, torch.bfloat16, out)
    assert torch.equal(out[-LAST:], reference.dequantize(codes[-LAST:], scales[-LAST:], None, 4, 128, cols, torch.bfloat16))
    assert not bool(out[:: rows // 50].isnan().any())


def test_matmul():
    """y has more than 2³¹ elements."""
    rows, cols, m = 140_000, 128, 15_500
    codes = tile_codes(torch.randint(0, 16, (rows, cols), dtype=torch.uint8), 4).cuda()
    scales, x = torch.rand(rows, 1, device="cuda"), torch.randn(m, cols, dtype=torch.bfloat16, device="cuda")
    assert rows * m > 1 << 31
    for route in ops.ROUTES:
        y = ops.quant_matmul(x, codes, scales, None, 4, 128, route=route)
        right = reference.quant_matmul(x[-LAST:].float(), codes[-LAST:], scales[None, -LAST:], None, 4, 128)
        assert float((y[-LAST:, -LAST:].float() - right).norm() / right.norm()) < 5e-3


def test_perturb_and_update():
    rows, cols, uid = 17_000_000, 128, 0x9ABCDEF1
    values = torch.ones(rows, cols, device="cuda")
    assert values.numel() > 1 << 31
    seen = ops.perturb(values, torch.tensor([[5, 6, 0]], device="cuda"), torch.tensor([0.25], device="cuda"), uid, 0.0, True, False)[0]
    block = torch.arange(rows - LAST, rows, device="cuda")
    words = torch.stack(reference.philox(5, block, uid, 6, 0), 1)
    col = torch.arange(cols, device="cuda")
    z = ((words[:, col // 32] >> (col % 32)) & 1) * 2.0 - 1
    assert torch.equal(seen[-LAST:], 1 + 0.25 * z)
    del seen
    ops.update_(values, torch.tensor([5, 6], device="cuda"), torch.tensor([[0.25]], device="cuda"), uid, 0.0, True, False)
    assert torch.equal(values[-LAST:], 1 - 0.25 * z)


def test_fake_quantize_rows():
    x = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    seen = ops_asym.fake_quantize_rows(x, 4)
    assert torch.equal(seen[-LAST:], reference_qat.fake_quantize_rows(x[-LAST:], 4))
