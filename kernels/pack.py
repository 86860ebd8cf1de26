"""Integer codes of 2, 3, 4 or 8 bits in int32 words: as GPTQ files hold them, and as the kernels want them.

Files (`pack_codes`): a contiguous little-endian bit stream along the packed axis. Code c of a row occupies bits
c·bits … c·bits + bits − 1 of the row, bit i of a row is bit i mod 32 of word i // 32. Three bits cross word boundaries
(32 codes in 3 words).

Memory (`tile_codes`): blocks of 128 columns, 4·bits words each, in the order in which a tensor core takes its operand.
Word t·b + v of a block (t in 0 … 3, v in 0 … b − 1) holds b-bit fields; field p of its half h (the low or the high 16 bits)
is the code of column 8·b·p + 8·v + 2·t + h. So one mask yields two neighbouring columns in the two halves of a register, and a
thread of the tensor core's fragment finds its columns in b neighbouring words. b is `bits`; codes of 3 bits are stored
as their low two bits (8 words, b = 2) followed by their high bit (4 words, b = 1). Columns beyond the last are 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_BITS = (2, 3, 4, 8)
TILE = 128  # columns per block of codes in memory


def packed_words(cols: int, bits: int) -> int:
    """Number of int32 words that hold `cols` codes of `bits` bits. ValueError if `bits` is not 2, 3, 4 or 8."""
    if bits not in _BITS:
        raise ValueError(f"bits = {bits}: expected one of {_BITS}")
    return (cols * bits + 31) // 32


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [R, C] into int32 words [R, packed_words(C, bits)]; the rest of the last word is zero.

    ValueError if `codes` is not 2-D uint8 or holds a code of more than `bits` bits.
    """
    words = packed_words(codes.shape[-1], bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} of shape {tuple(codes.shape)}; expected uint8 of shape [R, C]")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"codes: the largest is {int(codes.max())}; expected at most {(1 << bits) - 1} for {bits} bits")
    rows, cols = codes.shape
    eights = pad(codes, (0, -cols % 8)).view(rows, -1, 8)
    # Eight codes fill exactly `bits` bytes, whatever the width: build them in one int64 and keep its low bytes.
    stream = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for j in range(8):
        stream |= eights[:, :, j].to(torch.int64) << (bits * j)
    packed = stream.view(torch.uint8).view(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return pad(packed, (0, 4 * words - packed.shape[1])).contiguous().view(torch.int32)


def unpack_codes(words: Tensor, bits: int, cols: int) -> Tensor:
    """Unpack int32 words [R, packed_words(cols, bits)] into uint8 codes [R, cols]; the inverse of `pack_codes`.

    The result may be a view of a wider buffer. ValueError if `words` has another dtype or shape.
    """
    expected = packed_words(cols, bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise ValueError(
            f"words: {words.dtype} of shape {tuple(words.shape)}; expected int32 of shape [R, {expected}]"
            f" for {cols} columns of {bits} bits"
        )
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        codes = octets
    elif bits == 4:
        # Spread each byte over the two bytes of an int16: contiguous arithmetic, no strided writes.
        x = octets.to(torch.int16)
        codes = (x << 4).bitwise_or_(x).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits == 2:
        x = octets.to(torch.int32)
        x = (x << 12).bitwise_or_(x).bitwise_and_(0x000F000F)
        codes = (x << 6).bitwise_or_(x).bitwise_and_(0x03030303).view(torch.uint8)
    else:
        codes = _unpack_three(octets)
    return codes[:, :cols]


def _unpack_three(octets: Tensor) -> Tensor:
    """uint8 codes of a 3-bit stream of bytes [R, B]: eight codes in every three bytes."""
    rows = octets.shape[0]
    triples = pad(octets, (0, -octets.shape[1] % 3)).view(rows, -1, 3).to(torch.int32)
    stream = triples[:, :, 0] | (triples[:, :, 1] << 8) | (triples[:, :, 2] << 16)
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=octets.device)
    return ((stream[:, :, None] >> shifts) & 7).to(torch.uint8).view(rows, -1)


def tiled_words(cols: int, bits: int) -> int:
    """Number of int32 words of a row of `cols` codes in memory. ValueError if `bits` is not 2, 3, 4 or 8."""
    packed_words(cols, bits)
    return -(-cols // TILE) * 4 * bits


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the fields that make up a code, low bits first."""
    return (2, 1) if bits == 3 else (bits,)


def tile_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] in memory's layout, int32 [R, tiled_words(C, bits)]; see the top of this file.

    ValueError if `codes` is not 2-D uint8.
    """
    words = tiled_words(codes.shape[-1], bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} of shape {tuple(codes.shape)}; expected uint8 of shape [R, C]")
    blocks = pad(codes, (0, -codes.shape[1] % TILE)).view(codes.shape[0], -1, TILE)
    parts, low = [], 0
    for b in planes(bits):
        columns = blocks.unflatten(2, (16 // b, b, 4, 2))  # [R, blocks, p, v, t, h]
        halves = torch.zeros(*blocks.shape[:2], b, 4, 2, dtype=torch.int32, device=codes.device)
        for p in range(16 // b):
            halves |= ((columns[:, :, p] >> low) & ((1 << b) - 1)).to(torch.int32) << (b * p)
        parts.append((halves[..., 0] | (halves[..., 1] << 16)).transpose(2, 3).flatten(2))
        low += b
    return torch.cat(parts, 2).view(codes.shape[0], words)


def untile_codes(words: Tensor, bits: int, cols: int) -> Tensor:
    """int16 codes [R, cols] of words [R, tiled_words(cols, bits)]; may be a view. The inverse of `tile_codes`."""
    expected = tiled_words(cols, bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise ValueError(
            f"codes: {words.dtype} of shape {tuple(words.shape)}; expected int32 of shape [R, {expected}]"
            f" for {cols} columns of {bits} bits"
        )
    blocks = words.view(words.shape[0], -1, 4 * bits)
    codes, first, low = None, 0, 0
    for b in planes(bits):
        part = blocks[:, :, first : first + 4 * b].unflatten(2, (4, b)).transpose(2, 3).flatten(2)  # [R, blocks, (v, t)]
        fields = torch.stack([part >> shift for shift in range(0, 16, b)], 2).bitwise_and_(((1 << b) - 1) * 0x10001)
        plane = fields.view(torch.int16).view(words.shape[0], -1)
        codes = plane if codes is None else plane.bitwise_left_shift_(low).bitwise_or_(codes)
        first, low = first + 4 * b, low + b
    return codes[:, :cols]
