"""Weights of vector codebooks: the reference against plain indexing, the Triton launcher against the reference, the product under noise."""

import pytest
import torch
from test_dequant import DEVICE, DTYPES, NOISES, poisoned

from qzo_kernels import ops, ops_vectors, reference, reference_vectors

pytest.importorskip("triton")
from qzo_kernels.vectors import launch_vector_dequantize  # noqa: E402

# codebooks, vectors, rows, cols: one code word, rows and columns that fill no tile
CASES = [(1, 65536, 1, 8), (1, 65536, 17, 184), (2, 256, 1, 16), (2, 256, 63, 528), (2, 256, 3, 1048)]
CASE = "count,size,rows,cols"
pytestmark = pytest.mark.usefixtures("poison")


def make(count, size, rows, cols):
    """(codes as whole numbers [N, K/8, C], the words that hold them, codebooks fp16)."""
    g = torch.Generator().manual_seed(rows + cols)
    plain = torch.randint(0, size, (rows, cols // 8, count), generator=g)
    plain[0, 0], plain[-1, -1] = 0, size - 1
    small = torch.int8 if size == 256 else torch.int16
    words = torch.full((rows, reference_vectors.vector_words(cols, count, size)), -1, dtype=torch.int32)
    words.view(small)[:, : cols // 8 * count] = torch.where(plain >= size // 2, plain - size, plain).to(small).flatten(1)
    return plain, words.to(DEVICE), torch.randn(count, size, 8, generator=g).half().to(DEVICE)


@pytest.mark.parametrize(CASE, CASES)
def test_reference_is_the_equation(count, size, rows, cols):
    plain, words, books = make(count, size, rows, cols)
    exact = sum(books[c].float()[plain[..., c].to(DEVICE)] for c in range(count)).flatten(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(reference_vectors.vector_dequantize(words, books, cols, dtype), exact.to(dtype))


@pytest.mark.parametrize(CASE, CASES)
def test_launcher_equals_reference(count, size, rows, cols):
    """Every dtype of codebooks and weights, bit for bit; the rows around the output keep their NaN."""
    _, words, books = make(count, size, rows, cols)
    for dtype in DTYPES:
        for table in (books, books.float()):
            around = poisoned(rows + 2, cols, dtype)
            launch_vector_dequantize(words, table, around[1:-1])
            assert torch.equal(around[1:-1], reference_vectors.vector_dequantize(words, table, cols, dtype))
            assert bool(around[0].isnan().all()) and bool(around[-1].isnan().all())


@pytest.mark.parametrize("relative,gaussian", NOISES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variants", [0, 1, 4])
def test_product_equals_reference(relative, gaussian, bias, variants):
    """Under the noise that `perturb` gives; each variant multiplies its own rows."""
    _, words, books = make(2, 256, 63, 528)
    g = torch.Generator().manual_seed(3)
    scales = (0.5 + torch.rand(63, 1, generator=g)).to(DEVICE)
    x, b = torch.randn(4, 3, 528, generator=g).to(DEVICE), torch.randn(63, generator=g).to(DEVICE) if bias else None
    noise = ops.Noise(torch.tensor([[5, 7, v // 2] for v in range(variants)], device=DEVICE), torch.tensor([0.2, -0.2] * 2, device=DEVICE)[:variants],
                      0x9ABCDEF1, 1e-3, relative, gaussian) if variants else None  # fmt: skip
    y = ops_vectors.vector_matmul(x, words, books, scales, b, noise)
    seen = reference.perturb(scales, *noise) if noise else scales[None]
    right = reference_vectors.vector_matmul(x.flatten(0, 1), words, books, seen, b).view(4, 3, 63)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-4)
    half = ops_vectors.vector_matmul(x.bfloat16(), words, books, scales, None if b is None else b.bfloat16(), noise)
    assert half.dtype == torch.bfloat16 and float((half.float() - right).norm() / right.norm()) < 6e-3
    if noise:
        quiet = reference_vectors.vector_matmul(x.flatten(0, 1), words, books, scales[None], b).view(4, 3, 63)
        assert float((y - quiet).norm() / right.norm()) > 0.05


@pytest.mark.parametrize("change,said", [
    ({"codebooks": torch.zeros(1, 100, 8)}, "codebooks: shape"), ({"codebooks": torch.zeros(2, 256, 8, dtype=torch.int32)}, "codebooks: torch.int32"),
    ({"codes": torch.zeros(63, 32, dtype=torch.int32)}, "codes: torch.int32 of shape (63, 32)"), ({"scales": torch.ones(63)}, "scales"),
    ({"x": torch.zeros(3, 512)}, "codes: "), ({"x": torch.zeros(3, 524)}, "out: shape"), ({"bias": torch.zeros(62)}, "bias"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, said):
    _, words, books = make(2, 256, 63, 528)
    given = {"x": torch.zeros(3, 528), "codes": words.cpu(), "codebooks": books.cpu(), "scales": torch.ones(63, 1)} | change
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        ops_vectors.vector_matmul(**given)


def test_operator_is_well_formed():
    _, words, books = make(2, 256, 63, 528)
    torch.library.opcheck(ops_vectors._vector_dequantize, (words, books, torch.empty(63, 528, device=DEVICE)))
