"""Noise version 1: an independent numpy implementation, frozen vectors, and the same integers from torch and Triton."""

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from qzo_kernels import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from qzo_kernels import noise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 17), (17, 3), (63, 1), (1, 257), (5, 63), (3, 108), (2, 128), (7, 172)]
COUNTERS = [(0, 0, 0, 0), (-1, 4294967295, 3, 0xFFFFFFFF), (-(1 << 63), 12, 1, 0x80000000), (0x123456789ABCDEF, 7, 15, 42)]
PER_CALL = {"rademacher": 128, "gaussian": 4, "integer_normal": 8, "uniform24": 4}


def np_philox(seed: int, counter: list) -> list[np.ndarray]:
    """Philox4x32-10 of Salmon et al. 2011, in uint64 arithmetic."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ np.uint64(key[0]), b & mask, (a >> shift) ^ c[3] ^ np.uint64(key[1]), a & mask]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return c


def np_noise(kind: str, shape, seed, step, direction, uid, stream=0) -> np.ndarray:
    """Every distribution, element by element from the words of its block."""
    row, col = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    per = PER_CALL[kind]
    w = np.stack(np_philox(seed, [row * -(-shape[1] // per) + col // per, uid, step, direction * 8 + stream]), -1)
    j = (col % per)[..., None]

    def word(index):
        return np.take_along_axis(w, index, -1)[..., 0].astype(np.int64)

    if kind == "rademacher":
        return np.where((word(j // 32) >> (col % 32)) & 1, 1.0, -1.0).astype(np.float32)
    if kind == "uniform24":
        return word(j) >> 8
    if kind == "integer_normal":
        half = (word(j // 2) >> (16 * (col % 2))) & 0xFFFF
        quantile = {int(i): NormalDist().inv_cdf((int(i) + 0.5) / 65536) for i in np.unique(half)}
        return np.vectorize(lambda i: round(4096 * quantile[int(i)]), otypes=[np.int64])(half)
    u1, u2 = ((word(j // 2 * 2) >> 8) + 1) / 2.0**24, (word(j // 2 * 2 + 1) >> 8) / 2.0**24
    return np.sqrt(-2 * np.log(u1)) * np.where(col % 2, np.sin(2 * np.pi * u2), np.cos(2 * np.pi * u2))


def torch_noise(kind: str, shape, counters) -> torch.Tensor:
    stream = (2,) if kind == "uniform24" else ()
    return getattr(reference, kind)(shape, *counters, *stream)


@triton.jit
def _tile_kernel(
    p_out, p_table, p_counters, rows, cols, KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, ROWS).to(tl.int64)
    first = tl.program_id(0) * WIDTH
    seed, step = tl.load(p_counters), tl.load(p_counters + 1)
    direction, uid = tl.load(p_counters + 2), tl.load(p_counters + 3)
    if KIND == "rademacher":
        z = noise.rademacher(seed, step, direction, uid, row, first, cols, WIDTH)
    elif KIND == "gaussian":
        z = noise.gaussian(seed, step, direction, uid, row, first, cols, WIDTH)
    elif KIND == "uniform24":
        z = noise.uniform24(seed, step, direction, uid, row, first, cols, 2, WIDTH)
    else:
        z = noise.integer_normal(p_table, seed, step, direction, uid, row, first, cols, WIDTH)
    col = first + tl.arange(0, WIDTH)
    tl.store(p_out + row[:, None] * cols + col[None, :], z, mask=(row < rows)[:, None] & (col < cols)[None, :])


def triton_noise(kind: str, shape, counters, width: int) -> torch.Tensor:
    dtype = torch.float32 if kind in ("rademacher", "gaussian") else torch.int32
    out = torch.full(shape, -99, dtype=dtype, device=DEVICE)
    _tile_kernel[(triton.cdiv(shape[1], width),)](
        out, reference.normal_table().to(DEVICE), torch.tensor(counters, device=DEVICE), *shape,
        KIND=kind, ROWS=triton.next_power_of_2(shape[0]), WIDTH=width,
    )  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize(
    "seed,counter,expected",
    [
        (0, [0, 0, 0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, [0xFFFFFFFF] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(seed, counter, expected):
    """The known answers of the Random123 library (kat_vectors, philox4x32 10)."""
    expected = [int(x, 16) for x in expected.split()]
    assert [int(x) for x in np_philox(seed, counter)] == expected
    assert [int(x) for x in reference.philox(seed, *(torch.tensor(c) for c in counter))] == expected
    assert [int(x) for x in reference.philox(torch.tensor(seed), torch.tensor(counter[0]), *counter[1:])] == expected


def test_frozen_vectors():
    """Literals: a change of any of them breaks every journal written so far."""
    bits = torch_noise("rademacher", (2, 130), (20261122, 5, 2, 0xDEADBEEF)) > 0
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").tobytes().hex()
    assert packed == "c07a871904fbbb0e9de57bcba602783202880e36c7911c860b16ca2478c26f834c01"
    assert torch_noise("uniform24", (1, 5), (20261122, 5, 2, 0xDEADBEEF))[0].tolist() == [1057985, 5746155, 13982428, 11382581, 2720285]
    assert torch_noise("integer_normal", (1, 9), (20261122, 5, 2, 0xDEADBEEF))[0].tolist() == [-211, -5256, 8458, -6454, 5178, 3373, -9475, -3489, 298]
    gaussian = torch_noise("gaussian", (1, 5), (20261122, 5, 2, 0xDEADBEEF))[0].tolist()
    assert gaussian == pytest.approx([2.0083711, 0.7597058, 0.2209304, 0.6406013, -0.8651238], abs=2e-6)


def test_normal_table_is_frozen():
    table = reference.normal_table()
    assert table.dtype == torch.int16 and table.shape == (65536,)
    assert torch.equal(table, -table.flip(0)) and bool((table.diff() >= 0).all())
    assert hashlib.sha256(table.numpy().astype("<i2").tobytes()).hexdigest() == "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"
    exact = 4096 * torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    assert ((exact - exact.floor() - 0.5).abs().min()) > 1e-9, "an entry is near a tie: libraries could round it apart"


@pytest.mark.parametrize("kind", PER_CALL)
@pytest.mark.parametrize("counters", COUNTERS, ids=lambda c: f"seed{c[0]}")
def test_torch_equals_numpy(kind, counters):
    for shape in SHAPES:
        ours, theirs = torch_noise(kind, shape, counters), np_noise(kind, shape, *counters, 2 if kind == "uniform24" else 0)
        assert tuple(ours.shape) == shape
        if kind == "gaussian":
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=4e-6)
        else:
            np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("kind", PER_CALL)
@pytest.mark.parametrize("width", [8, 128])
def test_triton_equals_torch(kind, width):
    for shape, counters in zip(SHAPES, COUNTERS * 3):
        ours, theirs = triton_noise(kind, shape, counters, width), torch_noise(kind, shape, counters)
        if kind == "gaussian":
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)
        else:
            assert torch.equal(ours, theirs.to(ours.dtype)), (shape, counters)


@pytest.mark.parametrize("kind", PER_CALL)
def test_every_counter_matters(kind):
    """Seed (both words), step, direction, uid and stream each give other noise; a direction is not another's stream."""
    base = (5, 6, 1, 7)
    others = [(6, 6, 1, 7), (5 + (1 << 32), 6, 1, 7), (5, 7, 1, 7), (5, 6, 2, 7), (5, 6, 1, 8)]
    first = torch_noise(kind, (4, 128), base)
    for other in others:
        assert not torch.equal(first, torch_noise(kind, (4, 128), other)), other
    if kind == "uniform24":
        streams = [reference.uniform24((4, 128), *base, stream) for stream in (0, 1, 2, 3)]
        assert all(not torch.equal(streams[a], streams[b]) for a in range(4) for b in range(a))


def test_too_many_blocks_are_refused():
    with pytest.raises(ValueError, match="32 bits"):
        reference.rademacher((1 << 26, 128 * 65), 0, 0, 0, 0)


def test_rademacher_statistics():
    """Mean, columns, neighbours and pairs of directions within 5 sigma of independent fair signs."""
    rows, cols = 4096, 128
    z = [reference.rademacher((rows, cols), 11, 3, direction, 99).double() for direction in (0, 1)]
    assert set(z[0].unique().tolist()) == {-1.0, 1.0}
    assert abs(z[0].sum()) < 5 * (rows * cols) ** 0.5
    assert z[0].sum(0).abs().max() < 5 * rows**0.5
    for product in (z[0] * z[1], z[0][:, 1:] * z[0][:, :-1], z[0][1:] * z[0][:-1], z[0][:, 32:] * z[0][:, :-32]):
        assert abs(product.sum()) < 5 * product.numel() ** 0.5


def test_uniform24_statistics():
    """Mean, and every byte of the 24 bits flat by chi-square (255 degrees of freedom), within 5 sigma."""
    u = reference.uniform24((512, 1000), 11, 3, 0, 99, 1)
    n = u.numel()
    assert 0 <= int(u.min()) and int(u.max()) < 1 << 24
    assert abs(u.double().mean() / 2**24 - 0.5) < 5 * (1 / 12 / n) ** 0.5
    for shift in (0, 8, 16):
        counts = torch.bincount(((u >> shift) & 255).flatten(), minlength=256).double()
        chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "integer_normal"])
def test_normal_statistics(kind):
    """Mean, variance, skew, kurtosis and the correlation of a Box–Muller pair, within 5 sigma of N(0, 1)."""
    z = torch_noise(kind, (512, 1000), (11, 3, 0, 99)).double() / (4096 if kind == "integer_normal" else 1)
    n = z.numel()
    assert abs(z.mean()) < 5 * n**-0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    pairs = z.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 * (2 / n) ** 0.5
