"""Words of codes (pack.tile_codes) to numbers, as Triton device functions.

Compiled, a mask builds two 16-bit numbers at once out of a word (2⁷ + q as bf16, 2¹⁰ + q as fp16) and one subtraction takes
2⁷ + zero away: two instructions for two weights, no conversion. `ASM=False` computes the same in plain Triton.
"""

import triton
import triton.language as tl

_AND_OR_SUB = {
    "bf16": "{ .reg .b32 t; lop3.b32 t, $2, $3, 0x43004300, 0xEA; sub.bf16x2 t, t, $4; mov.b32 {$0, $1}, t; }",
    "fp16": "{ .reg .b32 t; lop3.b32 t, $2, $3, 0x64006400, 0xEA; sub.f16x2 t, t, $4; mov.b32 {$0, $1}, t; }",
}
_BF16 = tl.constexpr(_AND_OR_SUB["bf16"])
_FP16 = tl.constexpr(_AND_OR_SUB["fp16"])


@triton.jit
def _difference(w, zero, MASK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """(low, high): code − zero of the fields under MASK in both halves of w int32 [R, C]; zero int32, a scalar or [R, 1]."""
    if ASM:
        mask = tl.full(w.shape, MASK, tl.int32)
        if DTYPE == tl.bfloat16:
            less = tl.full(w.shape, 0, tl.int32) + (zero + 0x4300) * 0x10001
            low, high = tl.inline_asm_elementwise(_BF16, "=h,=h,r,r,r", [w, mask, less], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)
        else:
            less = tl.full(w.shape, 0, tl.int32) + (zero + 0x6400) * 0x10001
            low, high = tl.inline_asm_elementwise(_FP16, "=h,=h,r,r,r", [w, mask, less], dtype=(tl.float16, tl.float16), is_pure=True, pack=1)
    else:
        both = w & MASK
        low = ((both & 0xFFFF) - zero).to(DTYPE)
        high = (((both >> 16) & 0xFFFF) - zero).to(DTYPE)
    return low, high


@triton.jit
def _pair(w, high_plane, zero, P: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Fields P of words w [R, (v, t)] as DTYPE [R, (v, t), h]: columns 8·BITS·P … of a block, minus their zero."""
    if BITS == 8:
        # 2⁷ + q needs q < 128 in bf16: the two nibbles apart, both exact.
        l0, h0 = _difference(w >> (8 * P), zero & 15, 0x000F000F, DTYPE, ASM)
        l1, h1 = _difference(w >> (8 * P + 4), zero >> 4, 0x000F000F, DTYPE, ASM)
        q = tl.join(l1 * 16 + l0, h1 * 16 + h0)
    elif BITS == 3:
        R: tl.constexpr = w.shape[0]
        shift = tl.arange(0, 2)[None, :, None]
        third = (high_plane[:, None, :] >> (2 * P + shift)) & 0x00010001
        fields = ((w >> (2 * P)) & 0x00030003) | tl.reshape(third << 2, (R, 8))
        l, h = _difference(fields, zero, 0x00070007, DTYPE, ASM)
        q = tl.join(l, h)
    else:
        l, h = _difference(w >> (BITS * P), zero, ((1 << BITS) - 1) * 0x10001, DTYPE, ASM)
        q = tl.join(l, h)
    return q


@triton.jit
def differences(w, high_plane, zero, FIRST: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes − zero, DTYPE [R, PAIRS·2·words], of PAIRS pairs from pair FIRST on, in the order of the columns.

    w [R, (v, t)] is the plane of a block (of the low two bits for BITS = 3, high_plane [R, t] that of the third bit).
    """
    R: tl.constexpr = w.shape[0]
    WIDTH: tl.constexpr = PAIRS * w.shape[1] * 2
    q0 = _pair(w, high_plane, zero, FIRST, BITS, DTYPE, ASM)
    if PAIRS == 1:
        q = q0
    if PAIRS >= 2:
        q1 = _pair(w, high_plane, zero, FIRST + 1, BITS, DTYPE, ASM)
        if PAIRS == 2:
            q = tl.permute(tl.join(q0, q1), (0, 3, 1, 2))
    if PAIRS >= 4:
        q2 = _pair(w, high_plane, zero, FIRST + 2, BITS, DTYPE, ASM)
        q3 = _pair(w, high_plane, zero, FIRST + 3, BITS, DTYPE, ASM)
        if PAIRS == 4:
            q = tl.permute(tl.join(tl.join(q0, q2), tl.join(q1, q3)), (0, 3, 4, 1, 2))
    if PAIRS == 8:
        q4 = _pair(w, high_plane, zero, FIRST + 4, BITS, DTYPE, ASM)
        q5 = _pair(w, high_plane, zero, FIRST + 5, BITS, DTYPE, ASM)
        q6 = _pair(w, high_plane, zero, FIRST + 6, BITS, DTYPE, ASM)
        q7 = _pair(w, high_plane, zero, FIRST + 7, BITS, DTYPE, ASM)
        even = tl.join(tl.join(q0, q4), tl.join(q2, q6))
        odd = tl.join(tl.join(q1, q5), tl.join(q3, q7))
        q = tl.permute(tl.join(even, odd), (0, 3, 4, 5, 1, 2))
    return tl.reshape(q, (R, WIDTH))
