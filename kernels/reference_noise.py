"""Noise version 1 in plain PyTorch: the definition of its bits (frozen; changing it breaks every journal).

Philox4x32-10 (Salmon et al. 2011) with key = (low, high) words of an int64 seed and
counter = (block, uid, step, direction·8 + stream). Streams: 0 direction, 1 and 2 stochastic roundings of a forward,
3 rounding of an update.
"""

import functools
import math

import torch
from torch import Tensor

_Shape = tuple[int, int]
_Device = torch.device | str
_WORD = 0xFFFFFFFF


def philox(
    key: Tensor | int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words. `key` is an int64 seed; counters and words are int64 tensors (or ints) holding uint32."""
    tensors = [c for c in (c0, c1, c2, c3) if isinstance(c, Tensor)]
    device = tensors[0].device if tensors else None
    counters = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in (c0, c1, c2, c3)))
    # Both halves of a round in one operation each: even = (c0, c2), odd = (c1, c3).
    even, odd = torch.stack(counters[0::2]), torch.stack(counters[1::2])
    shape = (2,) + (1,) * (even.dim() - 1)
    factors = torch.tensor([0xD2511F53, 0xCD9E8D57], device=device).view(shape)
    for i in range(10):
        keys = [(int(key) + i * 0x9E3779B9) & _WORD, ((int(key) >> 32) + i * 0xBB67AE85) & _WORD]
        # The int64 product wraps, but its 64 bits are those of the unsigned product.
        product = (even * factors).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(torch.tensor(keys, device=device).view(shape)).bitwise_and_(_WORD)
        odd = product.bitwise_and_(_WORD)
    return even[0], odd[0], even[1], odd[1]


def _words(
    shape: _Shape, per_call: int, seed: int, step: int | Tensor, direction: int, uid: int, stream: int, device: _Device
) -> Tensor:
    """Words int64 [..., rows, ceil(cols/per_call), 4] of a tensor whose rows draw `per_call` elements from one Philox call.

    Leading dimensions are those of `step`: none for a number, [S] for int64 [S].
    """
    rows, calls = shape[0], -(-shape[1] // per_call)
    if rows * calls > 1 << 32:
        raise ValueError(f"shape {tuple(shape)}: needs {rows * calls} noise blocks; the counter has 32 bits")
    block = torch.arange(rows * calls, dtype=torch.int64, device=device)
    lead = step.shape if isinstance(step, Tensor) else ()
    step = step[..., None] if isinstance(step, Tensor) else step
    return torch.stack(philox(seed, block, uid, step, direction * 8 + stream), dim=-1).view(*lead, rows, calls, 4)


# Both signs of a direction and the update draw the same few words: 32 bytes for 128 columns of a row.
_kept_words = functools.lru_cache(maxsize=512)(_words)


def rademacher(shape: _Shape, seed: int, step: int | Tensor, direction: int, uid: int, device: _Device = "cpu") -> Tensor:
    """f32 [rows, cols] of ±1, one Philox call per row and 128 columns: bit col % 128, least significant first; 1 → +1.

    For steps int64 [S]: f32 [S, rows, cols].
    """
    draw = _words if isinstance(step, Tensor) else _kept_words
    words = draw(tuple(shape), 128, seed, step, direction, uid, 0, device).flatten(-2)
    col = torch.arange(shape[1], device=device)
    bits = (words[..., col // 32] >> (col % 32)).bitwise_and_(1)
    return bits.to(torch.float32).mul_(2).sub_(1)


def gaussian(shape: _Shape, seed: int, step: int | Tensor, direction: int, uid: int, device: _Device = "cpu") -> Tensor:
    """f32 [rows, cols] of N(0, 1): Box–Muller in fp32 on the word pairs (0, 1), (2, 3), four elements per Philox call.

    u1 = ((w>>8)+1)·2⁻²⁴, u2 = (w'>>8)·2⁻²⁴; √(−2 ln u1)·cos 2πu2, then ·sin. The last bits may differ between devices.
    For steps int64 [S]: f32 [S, rows, cols].
    """
    words = _words(shape, 4, seed, step, direction, uid, 0, device)
    u1 = ((words[..., 0::2] >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (words[..., 1::2] >> 8).to(torch.float32) * 2.0**-24 * (2 * math.pi)
    radius = torch.sqrt(-2 * torch.log(u1))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-3)[..., : shape[1]]


@functools.cache
def normal_table() -> Tensor:
    """The frozen table int16 [65536] of the integer normal: round(4096·Φ⁻¹((i + ½)/65536)); a test pins its checksum."""
    u = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.round(4096 * torch.special.ndtri(u)).to(torch.int16)


def integer_normal(shape: _Shape, seed: int, step: int, direction: int, uid: int, device: _Device = "cpu") -> Tensor:
    """int16 [rows, cols] of 4096·N(0, 1) rounded: eight per Philox call, 16-bit halves in order, low half first."""
    words = _words(shape, 8, seed, step, direction, uid, 0, device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(shape[0], -1)[:, : shape[1]]
    return normal_table().to(device)[halves]


def uniform24(
    shape: _Shape, seed: int, step: int, direction: int, uid: int, stream: int, device: _Device = "cpu"
) -> Tensor:
    """int64 [rows, cols] of uniform integers in [0, 2²⁴): the high 24 bits of a word, four elements per Philox call."""
    return (_words(shape, 4, seed, step, direction, uid, stream, device) >> 8).view(shape[0], -1)[:, : shape[1]]
