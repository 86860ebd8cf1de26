"""Rows rounded to low bits and back in one launch: the Triton launcher and the operator against the reference, bit for bit."""

import pytest
import torch
from a8_operands import COMPILED, DEVICE, generator

from qzo_kernels import ops_asym
from qzo_kernels.reference_qat import FLOOR, fake_quantize_rows

pytest.importorskip("triton")
from qzo_kernels import a8_asym as kernels  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value", "divide by zero")]

BITS = (4, 6, 8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPANS = [None, 0.83, 1.2]
# Narrow and odd; the pieces of wide rows (one, two, several); one row and a last program that is not full.
SHAPES = [(1, 1), (7, 3), (17, 63), (33, 64), (9, 128), (5, 129), (4, 257), (2, 1000), (3, 5120), (2, 14336), (1, 16384), (2, 33000)]


def rows_of(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of every kind in turn: both signs, above 0, below 0, all equal, zeros."""
    x = torch.randn(rows, cols, generator=generator(rows + cols)) * torch.logspace(-2, 2, rows)[:, None]
    x[1::5], x[2::5], x[3::5], x[4::5] = x[1::5].abs() + 3, -x[2::5].abs() - 0.01, 5.7, 0
    return x.to(dtype).to(DEVICE)


def span_of(value: float | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor([value], device=DEVICE)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """The same numbers and the same NaN."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape and ours.device == expected.device
    if ours.dtype == torch.bfloat16 and not COMPILED:
        # Triton's interpreter cuts bf16 off where a device rounds.
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0, equal_nan=True)
    else:
        assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("i,shape", enumerate(SHAPES))
def test_launcher_equals_the_reference(poison, i, shape, dtype):
    x, bits, span = rows_of(*shape, dtype), BITS[i % 3], span_of(SPANS[(i + i // 3) % 3])
    before = x.clone()
    assert_same(kernels.launch_fake_quantize_rows(x, bits, span), fake_quantize_rows(x, bits, span))
    assert torch.equal(x, before)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [63, 300, 3000])
def test_every_width_with_every_span(poison, cols, bits, span):
    """fp16: the bits in which the interpreter stores as a device does."""
    for dtype in (torch.float32, torch.float16):
        x = rows_of(11, cols, dtype)
        assert_same(kernels.launch_fake_quantize_rows(x, bits, span_of(span)), fake_quantize_rows(x, bits, span_of(span)))


def test_bfloat16_is_read_exactly():
    """Whole numbers on a grid of step 1 come back, so that no rounding of the store is in question."""
    x = torch.arange(-100.0, 156).view(1, 256).repeat(3, 1).to(torch.bfloat16).to(DEVICE)
    assert torch.equal(kernels.launch_fake_quantize_rows(x, 8, None), x)
    assert torch.equal(fake_quantize_rows(x, 8), x)


@pytest.mark.parametrize("cols", [40, 200, 1200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [None, 0.5, 0.0, float("inf"), float("nan")])
def test_broken_rows_are_broken_as_the_reference_has_them(cols, dtype, span):
    """NaN of either sign, infinities, ranges and zero points beyond fp32, in a row of their own; their neighbours stay sound."""
    x = rows_of(12, cols)
    x[0, 3], x[1, -1], x[2, 0], x[3, 5] = float("nan"), -float("nan"), float("inf"), float("-inf")
    x[4, :2] = torch.tensor([3e38, -3e38])
    x[5], x[6], x[7, ::2], x[8] = 3e38, -3e38, 1e38, 2.0**-140
    x[9, :2] = torch.tensor([float("inf"), float("nan")])
    x = x.to(dtype)
    ours, expected = kernels.launch_fake_quantize_rows(x, 4, span_of(span)), fake_quantize_rows(x, 4, span_of(span))
    assert_same(ours, expected)
    if span is None:
        assert bool(ours[[0, 1, 2, 3, 4, 9]].isnan().all()) and bool(ours[[10, 11]].isfinite().all())


def test_ties_ends_and_small_ranges():
    """Δ = 1 and z = 0, halves on both sides of an even code; a range below the smallest step keeps that step."""
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 6.5, 14.5, 15.0]], device=DEVICE)
    assert kernels.launch_fake_quantize_rows(x, 4, None)[0].tolist() == [0, 0, 2, 2, 6, 14, 15]
    small = torch.tensor([[0.0, 1.5 * FLOOR, 2.5 * FLOOR, 2**-30]], device=DEVICE)
    assert (kernels.launch_fake_quantize_rows(small, 4, None) / FLOOR).tolist() == [[0, 2, 2, 0]]
    signed = torch.tensor([[-0.0, 0.0, -0.0], [-0.0, 1.0, 2.0], [-2.0, -1.0, -0.0]], device=DEVICE)
    ours, expected = kernels.launch_fake_quantize_rows(signed, 4, None), fake_quantize_rows(signed, 4)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


def test_the_width_chooses_the_program():
    """Narrow rows share one, a wide row has one of its own and is held in registers up to 16384 columns."""
    assert [kernels._geometry(cols)[0] for cols in (1, 64, 128, 300, 1024, 14336)] == [64, 16, 8, 4, 1, 1]
    made = {cols: kernels._geometry(cols)[1] for cols in (64, 3072, 5120, 14336, 40000)}
    assert [(c["WIDTH"], c["TAIL"], c["CHUNKS"]) for c in made.values()] == [(64, 0, 1), (2048, 1024, 1), (4096, 1024, 1), (16384, 0, 1), (16384, 0, 3)]
    for cols in range(1, 40000, 997):
        _, c = kernels._geometry(cols)
        assert c["WIDTH"] * c["CHUNKS"] + c["TAIL"] >= cols and c["num_warps"] in (1, 2, 4, 8)


def views() -> dict[str, torch.Tensor]:
    """Tensors [..., C] that lie in memory in every way, by what they are."""
    flat = torch.randn(2, 6, 5 * 64, generator=generator(1)).to(DEVICE)
    heads = flat.unflatten(-1, (5, 64)).transpose(1, 2)
    return {
        "heads": heads, "one head": heads[:, :1].contiguous().transpose(1, 2), "one token": flat[:, :1].unflatten(-1, (5, 64)).transpose(1, 2),
        "gaps": heads[:, 1:4], "every other": flat[:, ::2], "columns apart": flat.transpose(1, 2), "columns of gaps": flat[..., ::3],
        "expanded": flat[:, None].expand(2, 3, 6, 320), "five": heads.unflatten(1, (1, 5)).permute(2, 0, 3, 1, 4), "row": flat[1, 2],
        "no rows": flat[:0], "no tokens": heads[:, :, :0],
    }  # fmt: skip


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("bits", BITS)
def test_views_are_rounded_as_the_reference_does(name, bits):
    x = views()[name]
    before = x.clone()
    seen, span = ops_asym.fake_quantize_rows(x, bits, span_of(0.9)), span_of(0.9)
    assert_same(seen, fake_quantize_rows(x.contiguous(), bits, span))
    assert torch.equal(x, before)
    if name in ("heads", "five", "row"):
        assert seen.stride() == x.stride()


@pytest.mark.parametrize(("name", "copied"), [("heads", False), ("one head", False), ("one token", True), ("five", False), ("row", False), ("gaps", True), ("columns apart", True)])
def test_only_what_has_gaps_is_copied(monkeypatch, name, copied):
    given, x, real = [], views()[name], ops_asym._fake_quantize_rows
    monkeypatch.setattr(ops_asym, "_fake_quantize_rows", lambda x, *rest: given.append(x) or real(x, *rest))
    ops_asym.fake_quantize_rows(x, 4)
    assert (given[0].data_ptr() != x.data_ptr()) == copied and given[0].is_contiguous()


def test_sixteen_bits_are_the_tensor_itself():
    x = views()["columns apart"]
    assert ops_asym.fake_quantize_rows(x, 16) is x and ops_asym.fake_quantize_rows(x, 16, span_of(0.5)) is x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_satisfies_torch(dtype):
    x = rows_of(5, 63, dtype)
    for given in ((x, 4, span_of(0.9)), (x, 8, None)):
        torch.library.opcheck(torch.ops.qzo.fake_quantize_rows, given, test_utils=("test_schema", "test_faketensor"))
    assert ops_asym.fake_quantize_rows(torch.empty(2, 3, 6, 64, device="meta", dtype=dtype).transpose(1, 2), 4).shape == (2, 6, 3, 64)


@pytest.mark.gpu
def test_a_captured_graph_reads_x_and_span_anew():
    x, span = views()["heads"], span_of(1.0)
    ops_asym.fake_quantize_rows(x, 4, span)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = ops_asym.fake_quantize_rows(x, 4, span)
    x.mul_(-3)
    span.fill_(0.7)
    graph.replay()
    assert torch.equal(seen, fake_quantize_rows(x, 4, span))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "activation bits = 5: expected one of"), ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x: torch.int32"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "x: torch.float64"), ({"x": torch.zeros(3, 0)}, "1 column or more"),
        ({"x": torch.zeros(())}, "x: no dimensions"), ({"span": torch.ones(2)}, "span: .*shape \\(1,\\)"),
        ({"span": torch.ones(1).half()}, "span: torch.float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, match):
    given = {"x": torch.zeros(2, 3), "bits": 4} | change
    with pytest.raises(ValueError, match=match):
        ops_asym.fake_quantize_rows(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()})
