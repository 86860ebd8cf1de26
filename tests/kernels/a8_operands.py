"""What the tests of low-bit activations compute on."""

import torch

from qzo_kernels import reference_a8
from qzo_kernels.pack import tile_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = DEVICE == "cuda"
KINDS = ["int8"] + ["fp8"] * (not COMPILED or torch.cuda.get_device_capability() >= (8, 9))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(rows, cols, generator=generator(rows + cols)) * torch.logspace(-3, 3, rows)[:, None]
    x[rows // 2] = 0
    return x.to(dtype).to(DEVICE)


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def weight(bits: int, rows: int, cols: int, group_size: int, which: str) -> tuple:
    """(codes u8 [N, K], codes in memory, scales, zeros or None) with the zeros as `which` says."""
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator(bits * rows + cols), dtype=torch.uint8)
    groups = -(-cols // group_size)
    scales = torch.rand(rows, groups, generator=generator(cols)) / 100 + 1e-3
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator(rows), dtype=torch.uint8)
    if which == "same":
        zeros = zeros[:1, :1].expand(rows, groups)
    return codes.to(DEVICE), tile_codes(codes, bits).to(DEVICE), scales.to(DEVICE), None if which == "none" else zeros.to(DEVICE)


def operands(kind: str, variants: int, rows: int, n: int, cols: int, group_size: int) -> tuple:
    """(xq, x_scale, wq, scales) with rows · variants rows of x."""
    xq, x_scale = reference_a8.quantize_rows(activations(rows * variants, cols), kind)
    high = 128 if kind == "int8" else 16
    wq = torch.randint(1 - high, high, (n, cols), generator=generator(n + cols), dtype=torch.int8).to(xq.dtype).to(DEVICE)
    scales = torch.rand(variants, n, -(-cols // group_size), generator=generator(n)).to(DEVICE) + 0.1
    return xq, x_scale, wq, scales


def zeros_and_sums(xq: torch.Tensor, n: int, group_size: int) -> tuple:
    groups = -(-xq.shape[1] // group_size)
    zeros = torch.randint(0, 256, (groups, n), generator=generator(n), dtype=torch.uint8).to(DEVICE).t()
    return zeros, reference_a8.group_sums(xq, group_size)
