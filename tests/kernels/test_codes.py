"""Updates of packed codes: the Triton launcher against the reference, and the operator."""

import pytest
import torch

from qzo_kernels import ops_codes, reference
from qzo_kernels.pack import tile_codes, untile_codes
from qzo_kernels.reference_codes import quantized_normal, update_codes_

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from qzo_kernels import codes as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED, STEP, UID = -3 << 40 | 5, 70000, 0x9ABCDEF1

# bits, noise bits, with a residual, rows, cols, steps, directions, size of a code's move per noise level
CASES = [
    (2, 2, False, 1, 1, 1, 1, 0.1),
    (2, 3, True, 3, 17, 1, 1, 0.02),
    (2, 4, False, 17, 257, 1, 1, 0.3),
    (2, 8, True, 63, 172, 1, 1, 3.0),
    (2, 2, False, 5, 128, 1, 1, 1e6),
    (2, 3, True, 2, 300, 1, 1, 1e-4),
    (3, 3, False, 1, 1, 1, 2, 0.3),
    (3, 4, True, 3, 17, 1, 1, 3.0),
    (3, 8, False, 17, 257, 1, 1, 1e6),
    (3, 2, True, 63, 172, 1, 1, 1e-4),
    (3, 3, False, 5, 128, 1, 1, 0.5),
    (3, 4, True, 2, 300, 1, 1, 0.3),
    (4, 4, True, 1, 1, 1, 3, 1e6),
    (4, 8, False, 3, 17, 2, 2, 0.1),
    (4, 2, True, 17, 257, 1, 1, 0.02),
    (4, 3, False, 63, 172, 1, 1, 0.3),
    (4, 4, True, 5, 128, 2, 1, 3.0),
    (4, 8, False, 2, 300, 1, 2, 1e6),
    (8, 8, True, 1, 1, 2, 2, 0.02),
    (8, 2, False, 3, 17, 1, 3, 0.3),
    (8, 3, True, 17, 257, 1, 1, 3.0),
    (8, 4, False, 63, 172, 1, 1, 1e6),
    (8, 8, True, 5, 128, 2, 2, 1e-4),
    (8, 2, False, 2, 300, 2, 1, 0.02),
]
CASE = "bits,noise_bits,fed_back,rows,cols,steps,directions,size"
EITHER = pytest.mark.parametrize("fed_back", [False, True], ids=["plain", "residual"])
LAUNCHES = pytest.mark.parametrize("launch", [kernels.launch_update_codes, update_codes_], ids=["triton", "torch"])


def make(bits: int, rows: int, cols: int, fed_back: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random packed codes with every value of `bits` bits, and a random residual if `fed_back`."""
    generator = torch.Generator().manual_seed(1000 * rows + cols + bits)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)
    residual = torch.randint(-(1 << 15), 1 << 15, (rows, cols), generator=generator, dtype=torch.int16)
    return tile_codes(codes, bits).to(DEVICE), residual.to(DEVICE) if fed_back else None


def state(*fields: int) -> torch.Tensor:
    return torch.tensor(fields, dtype=torch.int64, device=DEVICE)


def make_coefs(steps: int, directions: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(steps + directions)
    return (size * (torch.rand(steps, directions, generator=generator) - 0.6)).to(DEVICE)


def copies(codes: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return codes.clone(), None if residual is None else residual.clone()


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] is theirs[1] is None or torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(CASE, CASES)
def test_launcher_equals_reference(bits, noise_bits, fed_back, rows, cols, steps, directions, size):
    """Bit for bit, and something moves; the rows around codes and residual stay as they were."""
    before = make(bits, rows + 2, cols, fed_back)
    around, theirs = copies(*before), copies(*(x if x is None else x[1:-1] for x in before))
    tail = (state(SEED, STEP), make_coefs(steps, directions, size), UID, bits, cols, noise_bits, 1 + cols % 2)
    kernels.launch_update_codes(*(x if x is None else x[1:-1] for x in around), *tail)
    update_codes_(*theirs, *tail)
    for ours, expected, old in zip(around, theirs, before, strict=True):
        if ours is not None:
            assert torch.equal(ours[1:-1], expected)
            assert torch.equal(ours[0], old[0]) and torch.equal(ours[-1], old[-1])
    last = theirs[1] if fed_back else theirs[0]
    assert rows * cols == 1 or not torch.equal(last, before[1 if fed_back else 0][1:-1])


def test_residual_at_any_address():
    """Rows of a multiple of four that begin two bytes off are read as well."""
    codes, residual = make(4, 3, 20, True)
    buffer = torch.zeros(61, dtype=torch.int16, device=DEVICE)
    shifted = buffer[1:].view(3, 20).copy_(residual)
    tail = (state(SEED, STEP), make_coefs(1, 1, 0.3), UID, 4, 20, 4, 2)
    ours = codes.clone()
    kernels.launch_update_codes(ours, shifted, *tail)
    update_codes_(codes, residual, *tail)
    assert_same((ours, shifted), (codes, residual))


@LAUNCHES
@EITHER
@pytest.mark.parametrize("bits", [3, 8])
def test_coefficients_of_zero_change_no_bit(launch, fed_back, bits):
    ours = make(bits, 3, 130, fed_back)
    before = copies(*ours)
    launch(*ours, state(SEED, STEP), torch.tensor([[0.0, -0.0]], device=DEVICE), UID, bits, 130, 4, 2)
    assert_same(ours, before)


@LAUNCHES
@EITHER
def test_steps_at_once_equal_steps_one_by_one(launch, fed_back):
    """A replay applies many journaled steps in one pass, padded with zeros: the same bits."""
    ours, coefs = make(8, 3, 20, fed_back), make_coefs(2, 2, 4.0)
    one_by_one = copies(*ours)
    for s in range(2):
        launch(*one_by_one, state(SEED, STEP + s), coefs[s : s + 1], UID, 8, 20, 3, 2)
    launch(*ours, state(SEED, STEP), torch.cat([coefs, torch.zeros_like(coefs[:1])]), UID, 8, 20, 3, 2)
    assert_same(ours, one_by_one)


@LAUNCHES
@EITHER
@pytest.mark.parametrize("size", [2000.0, 3e38])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_codes_stay_in_range(launch, fed_back, size):
    """A move that is too long, also one that overflows fp32, ends at the edge; the residual is the half that points outwards."""
    codes, residual = make(4, 4, 30, fed_back)
    before = untile_codes(codes, 4, 30).clone()
    u = quantized_normal((4, 30), SEED, STEP, 0, UID, 2, 4, DEVICE)
    launch(codes, residual, state(SEED, STEP), torch.tensor([[size]], device=DEVICE), UID, 4, 30, 4, 2)
    expected = torch.where(u > 0, 0, torch.where(u < 0, 15, before))
    assert torch.equal(untile_codes(codes, 4, 30), expected.to(torch.int16)) and bool((u > 0).any()) and bool((u < 0).any())
    if fed_back:
        assert set(residual[u > 0].tolist()) == {-32768} and set(residual[u < 0].tolist()) == {32767}


@LAUNCHES
@EITHER
def test_streams_are_roundings_of_one_noise(launch, fed_back):
    """Another stream, another update, by at most one level of the noise where the streams differ and nowhere else."""
    start, moved = make(8, 3, 50, fed_back), []
    u = [quantized_normal((3, 50), SEED, STEP, 0, UID, stream, 4, DEVICE).int() for stream in (1, 2)]
    for stream in (1, 2):
        codes, residual = copies(*start)
        launch(codes, residual, state(SEED, STEP), torch.tensor([[3.0]], device=DEVICE), UID, 8, 50, 4, stream)
        moved.append(untile_codes(codes, 8, 50).int())
    inside = (moved[0].minimum(moved[1]) > 0) & (moved[0].maximum(moved[1]) < 255)
    assert torch.equal((moved[0] - moved[1])[inside], 3 * (u[1] - u[0])[inside]) and bool((u[0] != u[1])[inside].any())


@triton.jit
def _quantized_kernel(p_out, p_table, p_counters, rows, cols, STREAM: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    row, eight = (lane // 8).to(tl.int64), lane % 8
    seed, step, direction, uid = tl.load(p_counters), tl.load(p_counters + 1), tl.load(p_counters + 2), tl.load(p_counters + 3)
    u = kernels.quantized_normals(p_table, seed, step, direction, uid, row, eight, cols, STREAM, LEVELS)
    for k in tl.static_range(8):
        tl.store(p_out + row * cols + eight * 8 + k, u[k], mask=(row < rows) & (eight * 8 + k < cols))


@pytest.mark.parametrize("noise_bits", range(2, 9))
def test_device_function_equals_reference(noise_bits):
    """Both streams of roundings, which differ; every level within ±(2^(b−1) − 1)."""
    table, both = reference.normal_table().to(DEVICE), []
    for rows, cols, stream in ((3, 17, 1), (16, 60, 1), (16, 60, 2)):
        out = torch.full((rows, cols), -999, dtype=torch.int32, device=DEVICE)
        levels = (1 << (noise_bits - 1)) - 1
        _quantized_kernel[(1,)](out, table, state(SEED, STEP, 2, UID), rows, cols, STREAM=stream, LEVELS=levels, LANES=128)
        both.append(quantized_normal((rows, cols), SEED, STEP, 2, UID, stream, noise_bits, DEVICE))
        assert torch.equal(out, both[-1].int()) and int(out.abs().max()) <= levels
    assert not torch.equal(both[1], both[2])


@EITHER
def test_operator(fed_back):
    """The registered operator gives what the reference gives, and satisfies torch's operator checks."""
    ours, coefs = make(4, 3, 40, fed_back), make_coefs(2, 2, 0.4)
    theirs, checked = copies(*ours), copies(*ours)
    tail = (state(SEED, STEP), coefs, UID, 4, 40, 4, 1)
    torch.ops.qzo.update_codes_(*ours, *tail)
    update_codes_(*theirs, *tail)
    assert_same(ours, theirs)
    torch.library.opcheck(torch.ops.qzo.update_codes_, (*checked, *tail), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"codes": torch.zeros(3, 8, dtype=torch.int32)}, r"codes: .* \(3, 8\); expected .* \(3, 16\)"),
        ({"codes": torch.zeros(48, dtype=torch.int32)}, "codes: .*2 dimensions"),
        ({"codes": torch.zeros(3, 16, dtype=torch.int64)}, "codes: torch.int64"),
        ({"codes": torch.zeros(16, 3, dtype=torch.int32).t()}, "codes: strides"),
        ({"residual": torch.zeros(3, 40, dtype=torch.int32)}, "residual: torch.int32"),
        ({"residual": torch.zeros(3, 41, dtype=torch.int16)}, "residual: "),
        ({"residual": torch.zeros(40, 3, dtype=torch.int16).t()}, "residual: strides"),
        ({"state": torch.zeros(3, dtype=torch.int64)}, "state: "),
        ({"coefs": torch.zeros(2)}, "coefs: "),
        ({"coefs": torch.zeros(1, 1, dtype=torch.float64)}, "coefs: torch.float64"),
        ({"coefs": torch.zeros(1, 1 << 16)}, "coefs: .*65536"),
        ({"uid": -1}, "uid: -1"),
        ({"bits": 5}, "bits = 5"),
        ({"cols": 0}, "cols = 0"),
        ({"cols": 129}, "codes: "),
        ({"noise_bits": 1}, "noise_bits = 1"),
        ({"noise_bits": 9}, "noise_bits = 9"),
        ({"stream": 0}, "stream = 0"),
        ({"stream": 3}, "stream = 3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    codes, residual = make(4, 3, 40, True)
    arguments = {
        "codes": codes, "residual": residual, "state": state(1, 2), "coefs": make_coefs(1, 1, 0.1), "uid": 1, "bits": 4, "cols": 40,
        "noise_bits": 4, "stream": 2, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops_codes.update_codes_(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
