"""Matmuls whose codes are under quantized noise, as torch custom operators `qzo::…`: the forwards of QuZO.

What each computes is defined in reference_noisy.py. Triton is imported by the first call that needs it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qzo_kernels import reference_noisy
from qzo_kernels.checks import check_matmul, require
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


def _check_noise(state: Tensor, eps: Tensor, uid: int, noise_bits: int, like: Tensor) -> None:
    if eps.dim() != 1 or not len(eps):
        raise ValueError(f"eps: shape {tuple(eps.shape)}; expected [V], V at least 1")
    require("eps", eps, torch.float32, (len(eps),), like)
    require("state", state, torch.int64, (len(eps), 3), like)
    if not 0 <= uid < 1 << 32:
        raise ValueError(f"uid: {uid}; expected 0 <= uid < 2**32")
    if not 2 <= noise_bits <= 8:
        raise ValueError(f"noise_bits = {noise_bits}: expected 2 to 8")


@torch.library.custom_op("qzo::code_noise", mutates_args=("out",))
def _code_noise(out: Tensor, state: Tensor, uid: int, noise_bits: int, stream: int) -> None:
    seed, step, direction = state.flatten().tolist()
    out.copy_(quantized_normal(tuple(out.shape), seed, step, direction, uid, stream, noise_bits, out.device))


@_code_noise.register_fake
def _(out, state, uid, noise_bits, stream):
    return None


def code_noise(rows: int, cols: int, state: Tensor, uid: int, noise_bits: int, stream: int, out: Tensor | None = None) -> Tensor:
    """int8 [rows, cols], into `out` if given: `reference_codes.quantized_normal` of state int64 [3] or [1, 3] = (seed, step, direction)."""
    out = torch.empty(rows, cols, dtype=torch.int8, device=state.device) if out is None else out
    _code_noise(out, state, uid, noise_bits, stream)
    return out


def noisy_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, bias: Tensor | None,
    noise: CodeNoise, kind: str | None = None, scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [..., N] of x's dtype under `noise`; kind None: 16-bit activations, x·Wᵀ with W of `reference_noisy.noisy_weight`, in fp32;
    "int8" or "fp8": `reference_noisy.noisy_matmul_a8`.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v. scratch uint8: memory for
    a weight or its noise; allocated if not given. ValueError names what does not fit.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    _check_noise(noise.state, noise.eps, noise.uid, noise.noise_bits, codes)
    check_matmul(flat, codes, scales, zeros, bias, None, None, bits, group_size, noise.uid, False)
    if len(flat) % len(noise.eps):
        raise ValueError(f"x: {len(flat)} rows; expected a multiple of the {len(noise.eps)} variants")
    if kind == "fp8" and noise.noise_bits > MOST_FP8:
        raise ValueError(f"noise_bits = {noise.noise_bits}: expected at most {MOST_FP8} with fp8, which holds no more levels")
    arguments = (flat, codes, scales, zeros, bits, group_size)
    if kind is None:
        weights = reference_noisy.noisy_weight(*arguments[1:], flat.shape[1], *noise[:4])
        parts = [part.float() @ weight.t() for part, weight in zip(flat.chunk(len(weights)), weights, strict=True)]
        y = torch.cat([part if bias is None else part + bias.float() for part in parts]).to(x.dtype)
    else:
        y = reference_noisy.noisy_matmul_a8(*arguments, kind, bias, *noise[:4])
    return y.view(*x.shape[:-1], codes.shape[0])
