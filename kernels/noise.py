"""Noise version 1 as Triton device functions: the integer bits of reference.py, for tiles of a [rows, cols] tensor.

Rows and columns are those of the whole tensor; `seed` int64, `step`, `direction` and `uid` any integer type.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, block, uid, step, direction, stream: tl.constexpr):
    """Four uint32 words per element of `block`: Philox4x32-10."""
    # tl.philox turns into a 64-bit generator when its first counter is int64, and bitcasts the others: cast them all.
    c1 = tl.cast(uid, tl.uint32)
    c2 = tl.cast(step, tl.uint32)
    c3 = tl.cast(direction * 8 + stream, tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), c1, c2, c3)


@triton.jit
def rademacher(seed, step, direction, uid, row, first, cols, WIDTH: tl.constexpr):
    """f32 [len(row), WIDTH] of ±1 for columns first … first + WIDTH − 1, all within one block of 128 columns."""
    w0, w1, w2, w3 = words(seed, row * tl.cdiv(cols, 128) + first // 128, uid, step, direction, 0)
    return sign(w0, w1, w2, w3, first % 128 + tl.arange(0, WIDTH))


@triton.jit
def sign(w0, w1, w2, w3, j):
    """f32 [R, C] of ±1: bit j [C] (0 … 127, int32) of the four words [R] of each row's Philox call."""
    low = tl.where((j < 32)[None, :], w0[:, None], w1[:, None])
    high = tl.where((j < 96)[None, :], w2[:, None], w3[:, None])
    word = tl.where((j < 64)[None, :], low, high)
    bit = (word << (31 - j % 32).to(tl.uint32)[None, :]) & 0x80000000
    return (bit ^ 0xBF800000).to(tl.float32, bitcast=True)  # -1, its sign flipped


@triton.jit
def moved(v, z, eps, floor, RELATIVE: tl.constexpr):
    """What a forward sees of v: `reference.perturb`, element by element. Compile without floating-point contraction."""
    if RELATIVE:
        m = v * (1.0 + eps * z)
    else:
        m = v + eps * z
    # Not tl.maximum, which would turn a NaN into the floor.
    m = tl.where(m < floor, floor, m)
    return tl.where(eps == 0.0, v, m)


@triton.jit
def row_signs(p_state, p_eps, n, variant, groups, uid, floor):
    """A variant's Rademacher signs for up to 128 groups, four words [len(n)], its eps, and the floor: none for eps = 0."""
    p_state += variant * 3
    block = n * tl.cdiv(groups, 128) + variant * 0
    w0, w1, w2, w3 = words(tl.load(p_state), block, uid, tl.load(p_state + 1), tl.load(p_state + 2), 0)
    eps = tl.load(p_eps + variant)
    return w0, w1, w2, w3, eps, tl.where(eps == 0.0, float("-inf"), floor)


@triton.jit
def seen(scale, w0, w1, w2, w3, group, eps, floor, RELATIVE: tl.constexpr, GROUPS: tl.constexpr = 128):
    """Scales of one of up to GROUPS groups as a variant sees them: `moved` with the sign set by one bit; floor -inf for eps = 0."""
    if GROUPS <= 32:
        word = w0
    elif GROUPS <= 64:
        word = tl.where(group < 32, w0, w1)
    else:
        word = tl.where(group < 64, tl.where(group < 32, w0, w1), tl.where(group < 96, w2, w3))
    bit = (word << (31 - group % 32).to(tl.uint32)) & 0x80000000
    step = (bit ^ (-eps).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    m = scale * (1.0 + step) if RELATIVE else scale + step
    return tl.where(m < floor, floor, m)


def signed(uid: int) -> int:
    """The same 32 bits as an int32: Triton types an argument by its value, and 2³¹ would compile a second kernel."""
    return uid - (1 << 32) if uid >> 31 else uid


@triton.jit
def gaussian(seed, step, direction, uid, row, first, cols, WIDTH: tl.constexpr):
    """f32 [len(row), WIDTH] of N(0, 1) for columns first … first + WIDTH − 1; `first` and WIDTH are multiples of 4."""
    four = first // 4 + tl.arange(0, WIDTH // 4)
    block = row[:, None] * tl.cdiv(cols, 4) + four[None, :]
    w0, w1, w2, w3 = words(seed, block, uid, step, direction, 0)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (row.shape[0], WIDTH))


@triton.jit
def _box_muller(w, v):
    u1 = ((w >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    angle = (v >> 8).to(tl.float32) * 5.9604644775390625e-08 * 6.283185307179586
    radius = tl.sqrt_rn(-2.0 * tl.log(u1))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def uniform24(seed, step, direction, uid, row, first, cols, stream: tl.constexpr, WIDTH: tl.constexpr):
    """uint32 [len(row), WIDTH], uniform in [0, 2²⁴), for columns first … first + WIDTH − 1; both multiples of 4."""
    four = first // 4 + tl.arange(0, WIDTH // 4)
    block = row[:, None] * tl.cdiv(cols, 4) + four[None, :]
    w0, w1, w2, w3 = words(seed, block, uid, step, direction, stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (row.shape[0], WIDTH)) >> 8


@triton.jit
def integer_normal(p_table, seed, step, direction, uid, row, first, cols, WIDTH: tl.constexpr):
    """int16 [len(row), WIDTH] from `reference.normal_table()` at `p_table`; `first` and WIDTH are multiples of 8."""
    eight = first // 8 + tl.arange(0, WIDTH // 8)
    block = row[:, None] * tl.cdiv(cols, 8) + eight[None, :]
    w0, w1, w2, w3 = words(seed, block, uid, step, direction, 0)
    # Joined in this order, the last axes read word 0, 1, 2, 3 and, within a word, its low half first.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.load(p_table + tl.reshape(tl.join(low, high), (row.shape[0], WIDTH)).to(tl.int32))
