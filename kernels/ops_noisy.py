"""Matmuls whose codes are under quantized noise, as torch custom operators `qzo::…`: the forwards of QuZO.

What each computes is defined in reference_noisy.py. Triton is imported by the first call that needs it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels import ops, reference_noisy
from qzo_kernels.checks import check_float, check_matmul, check_weight, require
from qzo_kernels.ops_a8 import check_kind
from qzo_kernels.reference_codes import quantized_normal

MOST_FP8 = 5  # bits of noise whose levels e4m3 holds


class CodeNoise(NamedTuple):
    """Noise on the codes of one tensor, for V variants of them.

    state int64 [V, 3], rows (seed, step, direction); eps f32 [V], signed: one level of the noise in grid steps. paired: variants
    2i and 2i + 1 are of one direction, whose noise is then made once.
    """

    state: Tensor
    eps: Tensor
    uid: int
    noise_bits: int
    paired: bool = False


def _check_draw(rows: int, cols: int, uid: int, noise_bits: int, fp8: bool) -> None:
    if not 0 <= uid < 1 << 32:
        raise ValueError(f"uid: {uid}; expected 0 <= uid < 2**32")
    if not 2 <= noise_bits <= 8:
        raise ValueError(f"noise_bits = {noise_bits}: expected 2 to 8")
    if fp8 and noise_bits > MOST_FP8:
        raise ValueError(f"noise_bits = {noise_bits}: expected at most {MOST_FP8} with fp8, which holds no more levels")
    if rows * -(-cols // 4) > 1 << 32:
        raise ValueError(f"codes: {rows} rows of {cols} columns need {rows * -(-cols // 4)} noise blocks; the counter has 32 bits")


def _check_noise(noise: CodeNoise, rows: int, cols: int, fp8: bool, like: Tensor) -> None:
    state, eps, uid, noise_bits, paired = noise
    if eps.dim() != 1 or not len(eps):
        raise ValueError(f"eps: shape {tuple(eps.shape)}; expected [V], V at least 1")
    require("eps", eps, torch.float32, (len(eps),), like)
    require("state", state, torch.int64, (len(eps), 3), like)
    _check_draw(rows, cols, uid, noise_bits, fp8)
    if paired and len(eps) % 2:
        raise ValueError(f"eps: {len(eps)} variants; expected an even number of them where they are paired")


def _check_code_noise(out: Tensor, state: Tensor, uid: int, noise_bits: int, stream: int) -> None:
    if out.dim() != 2 or out.dtype not in (torch.int8, torch.float8_e4m3fn) or not out.is_contiguous():
        raise ValueError(f"out: {out.dtype} of shape {tuple(out.shape)}; expected contiguous int8 or float8_e4m3fn of 2 dimensions")
    require("state", state, torch.int64, (3,) if state.dim() == 1 else (1, 3), out)
    _check_draw(*out.shape, uid, noise_bits, out.dtype != torch.int8)
    if stream not in (1, 2):
        raise ValueError(f"stream = {stream}: expected 1, the rounding of a forward, or 2, another one")


@torch.library.custom_op("qzo::code_noise", mutates_args=("out",))
def _code_noise(out: Tensor, state: Tensor, uid: int, noise_bits: int, stream: int) -> None:
    _check_code_noise(out, state, uid, noise_bits, stream)
    seed, step, direction = state.flatten().tolist()
    out.copy_(quantized_normal(tuple(out.shape), seed, step, direction, uid, stream, noise_bits, out.device))


@_code_noise.register_kernel("cuda")
def _(out, state, uid, noise_bits, stream):
    _check_code_noise(out, state, uid, noise_bits, stream)
    from qzo_kernels.noisy import launch_code_noise

    launch_code_noise(out, state, uid, noise_bits, stream)


@_code_noise.register_fake
def _(out, state, uid, noise_bits, stream):
    return None


def code_noise(rows: int, cols: int, state: Tensor, uid: int, noise_bits: int, stream: int, out: Tensor | None = None) -> Tensor:
    """int8 [rows, cols]: `reference_codes.quantized_normal` of state int64 [3] or [1, 3] = (seed, step, direction).

    Into `out` if given, int8 or, with noise_bits ≤ 5, e4m3. ValueError names what does not fit.
    """
    out = torch.empty(rows, cols, dtype=torch.int8, device=state.device) if out is None else out
    require("out", out, out.dtype, (rows, cols), state)
    _code_noise(out, state, uid, noise_bits, stream)
    return out


def _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, uid, noise_bits) -> None:
    check_float("out", out.dtype)
    if out.dim() != 2:
        raise ValueError(f"out: shape {tuple(out.shape)}; expected 2 dimensions")
    check_weight(codes, scales, zeros, bits, group_size, out.shape[1])
    require("out", out, out.dtype, (codes.shape[0], out.shape[1]), codes)
    require("eps", eps, torch.float32, (1,), codes)
    _check_noise(CodeNoise(state, eps, uid, noise_bits), *out.shape, False, codes)


@torch.library.custom_op("qzo::noisy_dequantize", mutates_args=("out",))
def noisy_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, state: Tensor, eps: Tensor,
    bits: int, group_size: int, uid: int, noise_bits: int,
) -> None:  # fmt: skip
    """`reference_noisy.noisy_weight` of one variant (state [1, 3], eps [1]), rounded once into out [N, K] of a float type.

    ValueError names what does not fit.
    """
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, uid, noise_bits)
    out.copy_(reference_noisy.noisy_weight(codes, scales, zeros, bits, group_size, out.shape[1], state, eps, uid, noise_bits)[0])


@noisy_dequantize.register_kernel("cuda")
def _(codes, scales, zeros, out, state, eps, bits, group_size, uid, noise_bits):
    _check_dequantize(codes, scales, zeros, out, state, eps, bits, group_size, uid, noise_bits)
    from qzo_kernels.noisy import launch_noisy_dequantize

    launch_noisy_dequantize(codes, scales, zeros, bits, group_size, out, state, eps, uid, noise_bits)


@noisy_dequantize.register_fake
def _(codes, scales, zeros, out, state, eps, bits, group_size, uid, noise_bits):
    return None


@torch.library.custom_op("qzo::noisy_a8", mutates_args=("scratch",))
def _noisy_a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, state: Tensor, eps: Tensor, scratch: Tensor | None,
    bits: int, group_size: int, kind: str, uid: int, noise_bits: int, paired: bool,
) -> Tensor:  # fmt: skip
    return reference_noisy.noisy_matmul_a8(x, codes, scales, zeros, bits, group_size, kind, bias, state, eps, uid, noise_bits)


@_noisy_a8.register_kernel("cuda")
def _(x, codes, scales, zeros, bias, state, eps, scratch, bits, group_size, kind, uid, noise_bits, paired):
    from qzo_kernels.noisy import launch_noisy_a8

    return launch_noisy_a8(x, codes, scales, zeros, bits, group_size, kind, bias, state, eps, uid, noise_bits, paired, scratch)


@_noisy_a8.register_fake
def _(x, codes, scales, zeros, bias, state, eps, scratch, bits, group_size, kind, uid, noise_bits, paired):
    return x.new_empty(x.shape[0], codes.shape[0])


def _through_weights(x, codes, scales, zeros, bits, group_size, bias, noise, scratch) -> Tensor:
    """The product with the weight of every variant, rounded to x's dtype, in memory."""

    def fill(v: int, weight: Tensor) -> None:
        state, eps = noise.state[v : v + 1], noise.eps[v : v + 1]
        noisy_dequantize(codes, scales, zeros, weight, state, eps, bits, group_size, noise.uid, noise.noise_bits)

    return ops.dense_matmul(x, codes.shape[0], len(noise.eps), bias, scratch, fill)


def noisy_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, bias: Tensor | None,
    noise: CodeNoise, kind: str | None = None, scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [..., N] of x's dtype under `noise`; kind None: 16-bit activations, x·Wᵀ with W of `reference_noisy.noisy_weight`, which
    CUDA rounds to x's dtype, summed in fp32; "int8" or "fp8": `reference_noisy.noisy_matmul_a8`.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v. scratch uint8: N·K elements
    of x's dtype, two bytes at least, for a weight or its noise; allocated if not given. ValueError names what does not fit.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    check_matmul(flat, codes, scales, zeros, bias, None, None, bits, group_size, noise.uid, False)
    _check_noise(noise, codes.shape[0], flat.shape[1], kind == "fp8", codes)
    if len(flat) % len(noise.eps):
        raise ValueError(f"x: {len(flat)} rows; expected a multiple of the {len(noise.eps)} variants")
    arguments = (flat, codes, scales, zeros)
    if kind is not None:
        check_kind(kind, zeros, bits, group_size, flat.shape[1], x.device)
        y = _noisy_a8(*arguments, bias, noise.state, noise.eps, scratch, bits, group_size, kind, *noise[2:])
    elif flat.is_cuda:
        y = _through_weights(*arguments, bits, group_size, bias, noise, scratch)
    else:
        weights = reference_noisy.noisy_weight(*arguments[1:], bits, group_size, flat.shape[1], *noise[:4])
        parts = [part.float() @ weight.t() for part, weight in zip(flat.chunk(len(weights)), weights, strict=True)]
        y = torch.cat([part if bias is None else part + bias.float() for part in parts]).to(x.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])
