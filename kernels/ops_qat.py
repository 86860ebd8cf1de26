"""The operators of ZeroQAT, `qzo::effective_weight` and `qzo::update_latent_`: Triton on CUDA tensors, plain PyTorch elsewhere.

What each computes is defined in reference_qat.py.
"""

import torch
from torch import Tensor

from qzo_kernels import reference_qat as reference
from qzo_kernels.checks import check_float, check_noise, check_update, require
from qzo_kernels.reference_qat import LatentNoise, Realized

BITS = (2, 3, 4, 6, 8)


def _groups(cols: int, group_size: int) -> int:
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size = {group_size}: expected at least 1, or -1 for whole rows")
    return 1 if group_size == -1 else -(-cols // group_size)


def _check_grid(weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int, s_in: Tensor | None, s_out: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; expected 2 dimensions")
    rows, cols = weight.shape
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: expected one of {', '.join(map(str, BITS))}")
    for name, tensor, shape in (("step", step, (rows, _groups(cols, group_size))), ("zero", zero, (rows, _groups(cols, group_size))),
                                ("s_in", s_in, (cols,)), ("s_out", s_out, (rows,))):  # fmt: skip
        if tensor is not None:
            require(name, tensor, torch.float32, shape, weight)


def _check_unit(weight: Tensor, group_size: int, rows: Tensor | None, cols: Tensor | None) -> None:
    if rows is not None:
        require("rows", rows, torch.float32, (weight.shape[0], _groups(weight.shape[1], group_size)), weight)
    if cols is not None:
        require("cols", cols, torch.float32, (weight.shape[1],), weight)


def _check_effective(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian) -> None:
    _check_grid(weight, step, zero, bits, group_size, s_in, s_out)
    check_float("dtype", dtype)
    check_float("weight", weight.dtype)
    require("weight", weight, weight.dtype if states is None else torch.float32, tuple(weight.shape), weight)
    if states is not None:
        check_noise(weight, states, eps, uid, gaussian)
        _check_unit(weight, group_size, rows, cols)


@torch.library.custom_op("qzo::effective_weight", mutates_args=())
def _effective_weight(
    weight: Tensor, step: Tensor, zero: Tensor, s_in: Tensor | None, s_out: Tensor | None, states: Tensor | None, eps: Tensor | None,
    rows: Tensor | None, cols: Tensor | None, bits: int, group_size: int, dtype: torch.dtype, uid: int, gaussian: bool,
) -> Tensor:  # fmt: skip
    _check_effective(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian)
    noise = None if states is None else LatentNoise(states, eps, uid, rows, cols, gaussian)
    return reference.effective_weight(weight, step, zero, bits, group_size, dtype, s_in, s_out, noise)


@_effective_weight.register_kernel("cuda")
def _(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian):
    _check_effective(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian)
    from qzo_kernels.qat import launch_effective_weight

    noise = None if states is None else LatentNoise(states, eps, uid, rows, cols, gaussian)
    return launch_effective_weight(weight, step, zero, bits, group_size, dtype, s_in, s_out, noise)


@_effective_weight.register_fake
def _(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian):
    return weight.new_empty(1 if eps is None else eps.shape[0], *weight.shape, dtype=dtype)


def effective_weight(
    weight: Tensor, step: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype, s_in: Tensor | None = None,
    s_out: Tensor | None = None, noise: LatentNoise | None = None,
) -> Tensor:  # fmt: skip
    """[V, N, K] of dtype: see `reference_qat.effective_weight`. ValueError names what does not fit."""
    states, eps, uid, rows, cols, gaussian = noise or (None, None, 0, None, None, False)
    return _effective_weight(weight, step, zero, s_in, s_out, states, eps, rows, cols, bits, group_size, dtype, uid, gaussian)


def _check_latent(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps) -> None:
    check_update(weight, state, coefs, uid, gaussian)
    _check_unit(weight, group_size, rows, cols)
    if step is not None:
        _check_grid(weight, step, zero, bits, group_size, s_in, s_out)
        if coefs.shape[1] != 1 or not eps > 0:
            raise ValueError(f"coefs: {coefs.shape[1]} directions, eps = {eps}; expected 1 direction and eps > 0 along the realized difference")


@torch.library.custom_op("qzo::update_latent_", mutates_args=("weight",))
def _update_latent_(
    weight: Tensor, state: Tensor, coefs: Tensor, step: Tensor | None, zero: Tensor | None, s_in: Tensor | None, s_out: Tensor | None,
    rows: Tensor | None, cols: Tensor | None, uid: int, group_size: int, gaussian: bool, bits: int, eps: float,
) -> None:  # fmt: skip
    _check_latent(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps)
    realized = None if step is None else Realized(step, zero, bits, s_in, s_out, eps)
    reference.update_latent_(weight, state, coefs, uid, group_size, rows, cols, gaussian, realized)


@_update_latent_.register_kernel("cuda")
def _(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps):
    _check_latent(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps)
    from qzo_kernels.qat import launch_update_latent

    realized = None if step is None else Realized(step, zero, bits, s_in, s_out, eps)
    launch_update_latent(weight, state, coefs, uid, group_size, rows, cols, gaussian, realized)


@_update_latent_.register_fake
def _(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps):
    return None


def update_latent_(
    weight: Tensor, state: Tensor, coefs: Tensor, uid: int, group_size: int, rows: Tensor | None, cols: Tensor | None, gaussian: bool,
    realized: Realized | None = None,
) -> None:  # fmt: skip
    """Apply S steps to a latent weight fp32 [N, K] in place: see `reference_qat.update_latent_`. ValueError names what does not fit.

    That coefs are finite is the caller's to see to.
    """
    step, zero, bits, s_in, s_out, eps = realized or (None, None, 0, None, None, 0.0)
    _update_latent_(weight, state, coefs, step, zero, s_in, s_out, rows, cols, uid, group_size, gaussian, bits, eps)
