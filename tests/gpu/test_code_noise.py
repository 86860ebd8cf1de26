"""Forwards under noise on the codes, on a CUDA device: close to the reference, the same bits again, and in a captured graph."""

import pytest
import torch
from qzo_kernels import ops_a8, ops_noisy, reference_noisy
from qzo_kernels.pack import tile_codes

pytestmark = pytest.mark.gpu
N, K, ROWS = 640, 1024, 192
LIMITS = {None: 8e-3, "int8": 4e-3, "fp8": 6e-3}  # rounding to bf16, and the 13 bits of an fp8 sum


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bits,group_size", [(4, 128), (3, 64)])
@pytest.mark.parametrize("kind", LIMITS)
def test_captured_forward(kind, bits, group_size, paired):
    """A graph reads state and eps when it runs: it gives the eager forward's bits for what they hold then."""
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        return
    generator = torch.Generator("cuda").manual_seed(bits)
    options = {"generator": generator, "device": "cuda"}
    codes = tile_codes(torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, **options), bits)
    scales = torch.rand(N, K // group_size, **options) / 100
    zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, **options)
    x = torch.randn(4 * ROWS, K, **options).bfloat16()
    bias = torch.randn(N, **options).bfloat16()
    state = torch.tensor([[7, 8, v // 2 if paired else v] for v in range(4)], device="cuda")
    eps = torch.tensor([0.5, -0.5, 0.3, -0.3], device="cuda")
    scratch = torch.empty(2 * N * K, dtype=torch.uint8, device="cuda")
    noise = ops_noisy.CodeNoise(state, eps, 99, 4, paired)

    def forward() -> torch.Tensor:
        return ops_noisy.noisy_matmul(x, codes, scales, zeros, bits, group_size, bias, noise, kind, scratch)

    first, graph = forward(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    state[:, 1] += 1
    eps *= 2
    graph.replay()
    eager = forward()
    assert torch.equal(y, eager) and not torch.equal(eager, first)
    if kind is None:
        weights = reference_noisy.noisy_weight(codes, scales, zeros, bits, group_size, K, *noise[:4])
        parts = [part.double() @ weight.double().t() for part, weight in zip(x.chunk(4), weights, strict=True)]
        right = torch.cat(parts) + bias.double()
    else:
        right = reference_noisy.noisy_matmul_a8(x, codes, scales, zeros, bits, group_size, kind, bias, *noise[:4]).double()
    assert (y.double() - right).norm() < LIMITS[kind] * right.norm()
    plain = None if kind is None else ops_a8.quant_matmul_a8(x, codes, scales, zeros, bits, group_size, kind, bias)
    assert plain is None or (plain.double() - right).norm() > 5 * LIMITS[kind] * right.norm()
