"""Fused Triton kernel of `quant_matmul`: y = x·W(s ± ε z)ᵀ from packed codes, without the weight in memory.

    y[m, n] = Σ_g s_eff[v(m), n, g] · P_g[n, m],    P_g[n, m] = Σ_{k in g} (q[n, k] − zero[n, g]) · x[m, k]

P_g comes from the tensor core and does not depend on the scale, which is applied in fp32: the rows of one launch may
carry several signs and directions while the codes are read once. The weight is the left operand, in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qzo_kernels import noise as noise_functions
from qzo_kernels.dispatch import Config, part_width, slots_of
from qzo_kernels.fields import differences
from qzo_kernels.pack import TILE


@triton.jit
def _load_plane(codes, tile_n, block, FIRST: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr):
    """int32 [BN, (v, t)]: the words of a plane of one block, in the order of the columns they hold."""
    w = codes.load([tile_n * BN, block * (4 * BITS) + FIRST])
    return tl.reshape(tl.permute(tl.reshape(w, (BN, 4, B)), (0, 2, 1)), (BN, 4 * B))


@triton.jit
def _tile(R, V, BM: tl.constexpr, PAIR: tl.constexpr, SPLITS: tl.constexpr):
    """(tile of weights, tile of x, tiles of x, split of K, first variant, its first row) of this program."""
    tiles_r = tl.cdiv(R, BM)
    tiles_m = tl.cdiv(V, 1 + PAIR) * tiles_r
    tile_m = tl.program_id(0) % tiles_m
    split = tl.program_id(0) // tiles_m % SPLITS
    tile_n = tl.program_id(0) // (tiles_m * SPLITS)
    return tile_n, tile_m, tiles_m, split, tile_m // tiles_r * (1 + PAIR), tile_m % tiles_r * BM


@triton.jit(do_not_specialize=["uid"])
def _matmul_kernel(
    rows_of_x, codes, third_bits, p_y, p_scales, p_zeros, p_bias, p_state, p_eps, p_partial, p_ticket,
    R, V, N, K, groups, stride_zn, stride_zg, uid, floor, blocks_per_split, variants,
    BITS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    PAIR: tl.constexpr, SPLITS: tl.constexpr, NOISE: tl.constexpr, SIGNS: tl.constexpr, RELATIVE: tl.constexpr, BIAS: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile_n, tile_m, tiles_m, split, a, row = _tile(R, V, BM, PAIR, SPLITS)
    b = tl.minimum(a + 1, V - 1)
    n = tile_n * BN + tl.arange(0, BN)
    held = tl.minimum(n, N - 1)
    p_scales_a = p_scales + held.to(tl.int64) * groups
    p_scales_b = p_scales_a
    if SLOTS > 1:
        inside = tl.minimum(row // (BM // SLOTS) + tl.arange(0, SLOTS), variants - 1)[None, :]
        a0, a1, a2, a3, eps_a, floor_a = noise_functions.row_signs(p_state, p_eps, n[:, None], inside, groups, uid, floor)
    elif NOISE == 1:
        a0, a1, a2, a3, eps_a, floor_a = noise_functions.row_signs(p_state, p_eps, n, a, groups, uid, floor)
        if PAIR:
            b0, b1, b2, b3, eps_b, floor_b = noise_functions.row_signs(p_state, p_eps, n, b, groups, uid, floor)
    if NOISE == 2:
        p_scales_b += tl.cast(N * groups, tl.int64) * b
        p_scales_a += tl.cast(N * groups, tl.int64) * a
    acc_a = tl.zeros((BN, BM), tl.float32)
    acc_b = tl.zeros((BN, BM if PAIR else 1), tl.float32)
    FIELD: tl.constexpr = 16 if BITS == 3 else 8 * BITS
    last = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(K, 128))
    for block in tl.range(split * blocks_per_split, last, num_stages=STAGES):
        if BITS == 3:
            w = _load_plane(codes, tile_n, block, 0, 2, 3, BN)
            third = _load_plane(third_bits, tile_n, block, 8, 1, 3, BN)
        else:
            w = _load_plane(codes, tile_n, block, 0, BITS, BITS, BN)
            third = w
        for part in tl.static_range(128 // PART):
            k = block * 128 + part * PART
            group = tl.minimum(k // GROUP, groups - 1) if GROUP else 0
            zero = ZERO
            if ZERO < 0:
                zero = tl.load(p_zeros + held * stride_zn + group * stride_zg).to(tl.int32)[:, None]
            q = differences(w, third, zero, part * PART // FIELD, PART // FIELD, BITS, DTYPE, ASM)
            s_a = tl.load(p_scales_a + group)
            product = tl.dot(q, rows_of_x.load([a * R + row, k]).T)
            if PAIR:
                s_b = tl.load(p_scales_b + group) if NOISE == 2 else s_a
                if NOISE == 1:
                    s_b = noise_functions.seen(s_b, b0, b1, b2, b3, group, eps_b, floor_b, RELATIVE, SIGNS)
                acc_b += tl.dot(q, rows_of_x.load([b * R + row, k]).T) * s_b[:, None]
            if SLOTS > 1:
                seen = noise_functions.seen(s_a[:, None], a0, a1, a2, a3, group, eps_a, floor_a, RELATIVE, SIGNS)
                acc_a += product * tl.reshape(tl.broadcast_to(seen[:, :, None], (BN, SLOTS, BM // SLOTS)), (BN, BM))
            else:
                if NOISE == 1:
                    s_a = noise_functions.seen(s_a, a0, a1, a2, a3, group, eps_a, floor_a, RELATIVE, SIGNS)
                acc_a += product * s_a[:, None]
    tile = tile_n * tiles_m + tile_m
    _write(p_y, p_bias, p_partial, p_ticket, acc_a, acc_b, R, V, N, n, a, row, tile, split, BM, PAIR, SPLITS, BIAS)


@triton.jit
def _write(
    p_y, p_bias, p_partial, p_ticket, acc_a, acc_b, R, V, N, n, a, row, tile, split,
    BM: tl.constexpr, PAIR: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The tile to y; with splits of K, by the program that comes last, which sums all parts in the order of K."""
    m = row + tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < R)[None, :]
    at = (a * R + m).to(tl.int64)[None, :] * N + n[:, None]
    other = inside & (a + 1 < V)
    further = tl.cast(R, tl.int64) * N
    if SPLITS == 1:
        _finish(p_y, p_bias, acc_a, at, inside, n, N, BIAS)
        if PAIR:
            _finish(p_y, p_bias, acc_b, at + further, other, n, N, BIAS)
    else:
        size = further * V
        tl.store(p_partial + split * size + at, acc_a, mask=inside)
        if PAIR:
            tl.store(p_partial + split * size + at + further, acc_b, mask=other)
        tl.debug_barrier()
        if tl.atomic_add(p_ticket + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            _finish(p_y, p_bias, _sum(p_partial + at, size, inside, SPLITS), at, inside, n, N, BIAS)
            if PAIR:
                at += further
                _finish(p_y, p_bias, _sum(p_partial + at, size, other, SPLITS), at, other, n, N, BIAS)
            tl.store(p_ticket + tile, 0)


@triton.jit
def _sum(p, size, mask, SPLITS: tl.constexpr):
    total = tl.load(p, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(p + split * size, mask=mask, other=0)
    return total


@triton.jit
def _finish(p_y, p_bias, acc, at, mask, n, N, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(p_bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    tl.store(p_y + at, acc.to(p_y.dtype.element_ty), mask=mask)


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TICKETS = 1 << 16  # more tiles are not split: they fill every device
_tickets: dict[tuple, Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """int32 zeros, which every launch leaves zero: one buffer per stream, so that a launch costs no fill.

    Captured launches share one, for graphs are replayed one after another. It is made by the first launch outside a
    capture: what a capture fills is filled only by replaying that one graph.
    """
    shared = (device.index, "graphs")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if shared not in _tickets:
            raise RuntimeError("quant_matmul: captured before its first launch; launch it once, then capture")
        return _tickets[shared]
    key = (device.index, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    for missing in {shared, key} - _tickets.keys():
        _tickets[missing] = torch.zeros(_TICKETS, dtype=torch.int32, device=device)
    return _tickets[key]


def launch_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, bias: Tensor | None, noise, config: Config
) -> Tensor:
    """`reference.quant_matmul` of x [M, K] (fp16 or bf16) under `noise`, on the device of x; arguments as checked by ops.py.

    ValueError for what the kernel does not take: the dequantizing route does.
    """
    (rows, groups), cols = scales.shape, x.shape[1]
    part = part_width(bits, group_size, cols)
    if not part:
        raise ValueError(f"group_size = {group_size}: the fused kernel takes multiples of 32 (64 for 8 bits) and whole rows")
    if x.is_cuda and x.dtype == torch.float32:
        raise ValueError("x: torch.float32; the fused kernel takes bfloat16 and float16")
    variants = 1 if noise is None else len(noise.eps)
    per_variant = x.shape[0] // variants
    mode = 0 if noise is None else 1
    if mode and (noise.gaussian or groups > 128):
        from qzo_kernels.perturb import launch_perturb

        scales, mode = launch_perturb(scales, *noise), 2
    slots = slots_of(per_variant, variants, config.rows_m) if mode == 1 else 1
    pair = slots == 1 and variants > 1 and per_variant <= config.rows_m // 2
    # Fewer words of signs are fewer registers, of which several variants hold many.
    held_signs = 128 if slots == 1 or groups > 64 else 64 if groups > 32 else 32
    # With slots, a tile takes rows as they come: to its geometry they are those of one variant.
    count, each = (1, len(x)) if slots > 1 else (variants, per_variant)
    height = config.rows_m // (2 if pair else 1)
    tiles = triton.cdiv(rows, config.rows_n) * triton.cdiv(count, 1 + pair) * triton.cdiv(each, height)
    per_split = triton.cdiv(triton.cdiv(cols, TILE), config.splits if tiles <= _TICKETS else 1)
    splits = triton.cdiv(triton.cdiv(cols, TILE), per_split)
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    partial = torch.empty(splits, *y.shape, dtype=torch.float32, device=x.device) if splits > 1 else None
    state, eps, uid, floor, relative = noise[:5] if mode == 1 else (None, None, 0, 0.0, False)
    # Loads by descriptor want rows of a multiple of 16 bytes, and give zeros beyond the last column and row.
    if cols % 8 or not x.is_contiguous() or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -cols % 8)).contiguous()
    with torch.cuda.device_of(x):
        _matmul_kernel[(tiles * splits,)](
            TensorDescriptor.from_tensor(x, [height, part]),
            TensorDescriptor.from_tensor(codes, [config.rows_n, 8 if bits == 3 else 4 * bits]),
            TensorDescriptor.from_tensor(codes, [config.rows_n, 4]),
            y, scales, zeros, bias, state, eps, partial, _ticket(x.device) if splits > 1 else None,
            each, count, rows, cols, groups, *((0, 0) if zeros is None else zeros.stride()),
            noise_functions.signed(uid), floor, per_split, variants,
            BITS=bits, SLOTS=slots, GROUP=0 if group_size >= cols else group_size, PART=part, ZERO=1 << (bits - 1) if zeros is None else -1,
            BN=config.rows_n, BM=height, PAIR=pair, SPLITS=splits, NOISE=mode, SIGNS=held_signs, RELATIVE=relative, BIAS=bias is not None,
            DTYPE=_DTYPES[x.dtype], ASM=x.is_cuda, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return y
