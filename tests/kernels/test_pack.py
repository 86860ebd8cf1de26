"""Packing against a bit stream built from Python integers, one bit at a time."""

import pytest
import torch

from qzo_kernels.pack import pack_codes, packed_words, tile_codes, tiled_words, unpack_codes, untile_codes

BITS = [2, 3, 4, 8]
COLS = [1, 3, 8, 10, 11, 17, 31, 32, 33, 63, 128, 172, 257]


def python_words(row: list[int], bits: int) -> list[int]:
    """The int32 words of a little-endian bit stream."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range((len(row) * bits + 31) // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * cols + bits)
    return torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLS)
def test_pack_is_the_bit_stream(bits, cols):
    codes = random_codes(3, cols, bits)
    codes[0] = (1 << bits) - 1
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, packed_words(cols, bits))
    assert packed.tolist() == [python_words(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLS)
def test_unpack_inverts_pack(bits, cols):
    codes = random_codes(5, cols, bits)
    unpacked = unpack_codes(pack_codes(codes, bits), bits, cols)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", BITS)
def test_views_of_any_strides(bits):
    """Packing reads a transposed tensor, unpacking a slice of words, as loading a GPTQ file does."""
    codes = random_codes(40, 7, bits)
    packed = pack_codes(codes.t(), bits)
    assert torch.equal(packed, pack_codes(codes.t().contiguous(), bits))
    wide = torch.stack((packed, packed), dim=-1)[..., 0]
    assert not wide.is_contiguous() and torch.equal(unpack_codes(wide, bits, 40), codes.t())


def test_bad_arguments_are_named():
    codes = random_codes(2, 9, 4)
    with pytest.raises(ValueError, match="bits = 5"):
        pack_codes(codes, 5)
    with pytest.raises(ValueError, match="codes: torch.int32"):
        pack_codes(codes.int(), 4)
    with pytest.raises(ValueError, match="largest is 16"):
        pack_codes(torch.full((1, 3), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"words: torch.int32 of shape \(2, 2\)"):
        unpack_codes(pack_codes(codes, 4), 4, 17)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [1, 17, 128, 172, 257])
def test_tiles_are_as_documented(bits, cols):
    """Every code is found at the word, half and field that pack.py's first lines name; the rest is zero."""
    codes = random_codes(3, cols, bits)
    tiled = tile_codes(codes, bits)
    assert tiled.dtype == torch.int32 and tiled.shape == (3, tiled_words(cols, bits))
    expected = torch.zeros(3, tiled.shape[1], dtype=torch.int64)
    for k in range(cols):
        first, low = k // 128 * 4 * bits, 0
        for b in (2, 1) if bits == 3 else (bits,):
            p, v, t, h = k % 128 // (8 * b), k // 8 % b, k // 2 % 4, k % 2
            field = (codes[:, k].to(torch.int64) >> low) & ((1 << b) - 1)
            expected[:, first + t * b + v] |= field << (b * p + 16 * h)
            first, low = first + 4 * b, low + b
    assert torch.equal(tiled.to(torch.int64) & 0xFFFFFFFF, expected)
    assert torch.equal(untile_codes(tiled, bits, cols).to(torch.uint8), codes)


def test_bad_tiles_are_named():
    with pytest.raises(ValueError, match="bits = 5"):
        tiled_words(9, 5)
    with pytest.raises(ValueError, match="codes: torch.int32"):
        tile_codes(random_codes(2, 9, 4).int(), 4)
    with pytest.raises(ValueError, match=r"codes: torch.int32 of shape \(2, 16\)"):
        untile_codes(tile_codes(random_codes(2, 9, 4), 4), 4, 129)
