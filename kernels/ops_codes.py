"""The operator `qzo::update_codes_`: Triton on CUDA tensors, plain PyTorch elsewhere; defined in reference_codes.py."""

import torch
from torch import Tensor

from qzo_kernels import reference_codes
from qzo_kernels.checks import require
from qzo_kernels.pack import tiled_words


def _check(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream) -> None:
    if codes.dim() != 2:
        raise ValueError(f"codes: shape {tuple(codes.shape)}; expected 2 dimensions")
    if cols < 1:
        raise ValueError(f"cols = {cols}: expected at least 1")
    rows = codes.shape[0]
    require("codes", codes, torch.int32, (rows, tiled_words(cols, bits)), codes)
    if residual is not None:
        require("residual", residual, torch.int16, (rows, cols), codes)
    require("state", state, torch.int64, (2,), codes)
    if coefs.dim() != 2 or coefs.shape[1] >= 1 << 16:
        raise ValueError(f"coefs: shape {tuple(coefs.shape)}; expected [steps, directions], fewer than 65536 directions")
    require("coefs", coefs, torch.float32, tuple(coefs.shape), codes)
    if not 0 <= uid < 1 << 32:
        raise ValueError(f"uid: {uid}; expected 0 <= uid < 2**32")
    if not 2 <= noise_bits <= 8:
        raise ValueError(f"noise_bits = {noise_bits}: expected 2 to 8")
    if stream not in (1, 2):
        raise ValueError(f"stream = {stream}: expected 1, the rounding of a forward, or 2, another one")
    if rows * -(-cols // 4) > 1 << 32:
        raise ValueError(f"codes: {rows} rows of {cols} columns need {rows * -(-cols // 4)} noise blocks; the counter has 32 bits")


@torch.library.custom_op("qzo::update_codes_", mutates_args=("codes", "residual"))
def update_codes_(
    codes: Tensor, residual: Tensor | None, state: Tensor, coefs: Tensor, uid: int, bits: int, cols: int, noise_bits: int, stream: int
) -> None:
    """Apply S steps to packed codes, and their residual if given, in place: see `reference_codes.update_codes_`.

    ValueError names an argument that does not fit; that coefs are finite is the caller's to see to.
    """
    _check(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream)
    reference_codes.update_codes_(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream)


@update_codes_.register_kernel("cuda")
def _(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream):
    _check(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream)
    from qzo_kernels.codes import launch_update_codes

    launch_update_codes(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream)


@update_codes_.register_fake
def _(codes, residual, state, coefs, uid, bits, cols, noise_bits, stream):
    return None
