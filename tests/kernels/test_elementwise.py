"""Norm, SwiGLU's product and rotary embedding: the reference against transformers, the Triton launchers against the reference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qzo_kernels import ops_elementwise as ops
from qzo_kernels import reference_elementwise as reference

pytest.importorskip("triton")
from qzo_kernels import elementwise as kernels  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter computes nonsense in bf16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2**-9, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2e-5},
}
NORMS = [(1, 1), (17, 5), (63, 64), (3, 100), (257, 128), (3, 512), (2, 1025), (3, 5120)]
HALVES = [(1, 1), (3, 17), (17, 172), (2, 1025), (3, 2816)]
# batch, length, heads of q and k, head dimension, q and k are slices of one tensor
ROTATIONS = [
    (1, 1, 1, 1, 2, False), (2, 17, 4, 2, 8, True), (3, 5, 5, 5, 40, False),
    (1, 63, 2, 1, 128, True), (2, 3, 40, 8, 128, False), (1, 7, 3, 1, 96, True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poison():
    """Memory that nothing has written yet holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rotation(batch, length, q_heads, k_heads, dim, sliced, dtype):
    q = normal(batch, length, q_heads * dim, dtype=dtype)
    k = normal(batch, length, k_heads * dim, dtype=dtype, seed=1)
    if sliced:
        q, k = torch.cat((q, k, k), -1).split((q.shape[-1], k.shape[-1], k.shape[-1]), -1)[:2]
    angles = normal(length, dim, dtype=torch.float32, seed=2) * 3
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "width"), NORMS)
def test_rms_norm(rows, width, residual, dtype):
    x, weight = normal(rows, width, dtype=dtype) * 3, normal(width, dtype=dtype, seed=1)
    other = normal(rows, width, dtype=dtype, seed=2) if residual else None
    before = x.clone()
    expected, total = reference.rms_norm(x, weight, 1e-5, other)
    normed, summed = kernels.launch_rms_norm(x, weight, 1e-5, other)
    assert torch.equal(summed, total) and torch.equal(x, before) and normed.dtype == dtype
    torch.testing.assert_close(normed, expected, **TOLERANCE[dtype])
    again = kernels.launch_rms_norm(x[:1].contiguous(), weight, 1e-5, None if other is None else other[:1].contiguous())[0]
    assert torch.equal(again, normed[:1]), "a row's bits depend on the other rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_is_that_of_transformers(dtype):
    x, residual, weight = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, 7, 48), (3, 7, 48), (48,)]))
    module = LlamaRMSNorm(48, 1e-6).to(DEVICE, dtype).requires_grad_(False)
    module.weight.copy_(weight)
    for other in (None, residual):
        normed, total = reference.rms_norm(x, weight, 1e-6, other)
        assert torch.equal(total, x if other is None else other + x) and torch.equal(normed, module(total))


def test_a_norm_of_large_and_of_broken_values():
    x = torch.full((2, 64), 3e4, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(kernels.launch_rms_norm(x, weight, 1e-6, None)[0], torch.ones_like(x), rtol=1e-3, atol=0)
    x[1, 3] = float("nan")
    normed = kernels.launch_rms_norm(x, weight, 1e-6, None)[0]
    assert normed[0].isfinite().all() and normed[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("rows", "cols"), HALVES)
def test_silu_mul(rows, cols, sliced, dtype):
    gate, up = normal(rows, cols, dtype=dtype) * 4, normal(rows, cols, dtype=dtype, seed=1)
    if sliced:
        gate, up = torch.cat((gate, up), -1).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.equal(reference.silu_mul(gate, up), expected)
    out = kernels.launch_silu_mul(gate, up)
    assert out.is_contiguous() and out.dtype == dtype
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


def test_silu_of_extremes():
    gate = torch.tensor([-3e4, -100.0, 0.0, 100.0, 3e4, float("nan")], dtype=torch.float16, device=DEVICE)
    out = kernels.launch_silu_mul(gate, torch.ones_like(gate))
    assert out[:5].tolist() == [0.0, 0.0, 0.0, 100.0, 30000.0] and out[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "length", "q_heads", "k_heads", "dim", "sliced"), ROTATIONS)
def test_rotary(batch, length, q_heads, k_heads, dim, sliced, dtype):
    q, k, cos, sin = rotation(batch, length, q_heads, k_heads, dim, sliced, dtype)
    heads = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k))
    expected = apply_rotary_pos_emb(*heads, cos[None], sin[None])
    for found in (reference.rotary(q, k, cos, sin), kernels.launch_rotary(q, k, cos, sin)):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y) and x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_reach_them_and_fakes_have_their_shapes(dtype):
    x, weight = normal(2, 3, 48, dtype=dtype), normal(48, dtype=dtype)
    calls = [
        (ops.rms_norm, reference.rms_norm, (x, weight, 1e-6)), (ops.rms_norm, reference.rms_norm, (x, weight, 1e-6, x)),
        (ops.silu_mul, reference.silu_mul, torch.cat((x, x), -1).chunk(2, -1)),
        (ops.rotary, reference.rotary, rotation(2, 5, 4, 2, 8, True, dtype)),
    ]  # fmt: skip
    for call, definition, arguments in calls:
        found, expected = call(*arguments), definition(*arguments)
        with FakeTensorMode() as mode:
            fake = call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for real, right, shape in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, expected, fake)), strict=True):
            torch.testing.assert_close(real, right, **TOLERANCE[dtype])
            assert (real.shape, real.stride(), real.dtype) == (shape.shape, shape.stride(), shape.dtype)


X, W = torch.ones(2, 3, 8), torch.ones(8)
REFUSED = {
    "weight": lambda: ops.rms_norm(X, W[:4], 1e-6),
    "weight: torch.float16": lambda: ops.rms_norm(X, W.half(), 1e-6),
    "x: strides": lambda: ops.rms_norm(X.transpose(0, 1), W, 1e-6),
    "x: shape": lambda: ops.rms_norm(torch.ones(1, (1 << 16) + 1), torch.ones((1 << 16) + 1), 1e-6),
    "x: torch.int64": lambda: ops.rms_norm(X.long(), W, 1e-6),
    "residual": lambda: ops.rms_norm(X, W, 1e-6, X[:1]),
    "up": lambda: ops.silu_mul(X, X[:1]),
    "gate: strides": lambda: ops.silu_mul(X.transpose(1, 2), X.transpose(1, 2)),
    "gate: torch.int64": lambda: ops.silu_mul(X.long(), X.long()),
    "cos": lambda: ops.rotary(X, X, torch.ones(3, 3), torch.ones(3, 3)),
    "q: shape": lambda: ops.rotary(X, X, torch.ones(3, 6), torch.ones(3, 6)),
    "k: shape": lambda: ops.rotary(X, X[:1], torch.ones(3, 4), torch.ones(3, 4)),
    "k: torch.float16": lambda: ops.rotary(X, X.half(), torch.ones(3, 4), torch.ones(3, 4)),
    "sin": lambda: ops.rotary(X, X, torch.ones(3, 4), torch.ones(3, 2)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REFUSED[message]()
