"""Matmuls with asymmetric activations of 4, 6 or 8 bits, as torch custom operators `qzo::…`: a quantized row is scale·q + shift.

y = scale·(q·Wᵀ) + shift ⊗ Σ_k W, the first product in int8 (ops_a8.py), the second a rank of one added where it is stored. Beside them
`fake_quantize_rows`, such rows as ZeroQAT sees them. What each computes is defined in reference_a8.py, of this one in reference_qat.py.
Triton is imported by the first call that needs it.
"""

import torch
from torch import Tensor

from qzo_kernels import ops, ops_a8, reference_a8, reference_qat
from qzo_kernels.checks import check_float, check_matmul, require, weight_in
from qzo_kernels.reference_a8 import code_sums as code_sums  # what a weight needs beside its codes, once

ACTIVATION_BITS = (4, 6, 8)


def _check_rows(x: Tensor, bits: int, span: Tensor | None) -> None:
    if bits not in ACTIVATION_BITS:
        raise ValueError(f"activation bits = {bits}: expected one of {ACTIVATION_BITS}")
    check_float("x", x.dtype)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected [rows, columns] with 1 column or more")
    require("x", x, x.dtype, tuple(x.shape), x)
    if span is not None:
        require("span", span, torch.float32, (1,), x)


@torch.library.custom_op("qzo::quantize_rows_asym", mutates_args=())
def quantize_rows_asym(x: Tensor, bits: int, span: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [M, K], scale f32 [M], shift f32 [M]) of contiguous x [M, K], bits 4, 6 or 8: see `reference_a8.quantize_rows_asym`.

    span f32 [1]: the share of a row's range that is kept; None is 1. ValueError names what does not fit.
    """
    _check_rows(x, bits, span)
    return reference_a8.quantize_rows_asym(x, bits, span)


@quantize_rows_asym.register_kernel("cuda")
def _(x, bits, span=None):
    _check_rows(x, bits, span)
    from qzo_kernels.a8_asym import launch_quantize_rows_asym

    return launch_quantize_rows_asym(x, bits, span)


@quantize_rows_asym.register_fake
def _(x, bits, span=None):
    scale = x.new_empty(len(x), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale, torch.empty_like(scale)


@torch.library.custom_op("qzo::fake_quantize_rows", mutates_args=())
def _fake_quantize_rows(x: Tensor, bits: int, span: Tensor | None = None) -> Tensor:
    _check_rows(x, bits, span)
    return reference_qat.fake_quantize_rows(x, bits, span)


@_fake_quantize_rows.register_kernel("cuda")
def _(x, bits, span=None):
    _check_rows(x, bits, span)
    from qzo_kernels.a8_asym import launch_fake_quantize_rows

    return launch_fake_quantize_rows(x, bits, span)


@_fake_quantize_rows.register_fake
def _(x, bits, span=None):
    return x.new_empty(x.shape)


def fake_quantize_rows(x: Tensor, bits: int, span: Tensor | None = None) -> Tensor:
    """x̂ like x [..., C], each row by its own range: see `reference_qat.fake_quantize_rows`. 16 bits give x itself. No gradient.

    bits 4, 6 or 8; span f32 [1], None is 1. A transposed x is read and written as it lies in memory, and x̂ lies as x does; only with
    gaps or with columns apart is it copied first. ValueError names what does not fit.
    """
    if bits == 16:
        return x
    if not x.dim():
        raise ValueError("x: no dimensions; expected [..., columns]")
    last = x.dim() - 1
    order = [*sorted(range(last), key=x.stride, reverse=True), last]
    lying = x.permute(order).contiguous()
    seen = _fake_quantize_rows(lying.flatten(0, -2) if last else lying[None], bits, span)
    return seen.view(lying.shape).permute([order.index(d) for d in range(x.dim())])


@torch.library.custom_op("qzo::a8_packed_asym", mutates_args=())
def _a8_packed_asym(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, csum: Tensor, span: Tensor | None, bias: Tensor | None,
    state: Tensor | None, eps: Tensor | None, bits: int, group_size: int, activation_bits: int,
    uid: int, floor: float, relative: bool, gaussian: bool,
) -> Tensor:  # fmt: skip
    noise = None if state is None else ops.Noise(state, eps, uid, floor, relative, gaussian)
    return _through_weight(x, codes, scales, zeros, csum, bits, group_size, activation_bits, span, bias, noise, None)


@_a8_packed_asym.register_kernel("cuda")
def _(x, codes, scales, zeros, csum, span, bias, state, eps, bits, group_size, activation_bits, uid, floor, relative, gaussian):
    from qzo_kernels.a8_asym import launch_quantize_rows_asym
    from qzo_kernels.a8_packed import launch_a8_packed

    noise = None if state is None else ops.Noise(state, eps, uid, floor, relative, gaussian)
    xq, x_scale, shift = launch_quantize_rows_asym(x, activation_bits, span, bits)
    return launch_a8_packed(
        xq, x_scale, codes, scales, zeros, bits, group_size, x.shape[1], x.dtype, bias, noise, shift=shift, csum=csum
    )  # fmt: skip


@_a8_packed_asym.register_fake
def _(x, codes, scales, zeros, csum, span, bias, state, eps, bits, group_size, activation_bits, uid, floor, relative, gaussian):
    return x.new_empty(x.shape[0], codes.shape[0])


def _through_weight(x, codes, scales, zeros, csum, bits, group_size, activation_bits, span, bias, noise, weight) -> Tensor:
    """The product with the whole 8-bit weight in memory."""
    xq, x_scale, shift = quantize_rows_asym(x, activation_bits, span)
    seen = scales[None] if noise is None else ops.perturb(scales, *noise)
    weight = ops_a8.unpack(codes, zeros, bits, group_size, x.shape[1], "int8", weight)
    less = zeros if bits == 8 else None
    return ops_a8.a8_matmul(xq, x_scale, weight, seen, group_size, x.dtype, bias, less, None, shift, reference_a8.row_sums(seen, csum))


def quant_matmul_asym(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, csum: Tensor, bits: int, group_size: int, activation_bits: int,
    span: Tensor | None = None, bias: Tensor | None = None, noise: ops.Noise | None = None, scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [..., N] of x's dtype with each row of x as `quantize_rows_asym` rounds it, weights as `ops.quant_matmul` has them.

    x [..., K]; its rows, flattened, are cut into V equal consecutive blocks, block v seeing variant v of `noise`. csum int32 [N, G]
    is `code_sums(codes, zeros, bits, group_size, K)`, which no noise on the scales changes. Codes of 6 bits are kept as 8 (`bits` 8).
    group_size: a multiple of 32, or K and up. scratch uint8: N·K bytes or more in which the 8-bit weight may lie where
    `ops_a8.takes_packed` says no; allocated if not given. ValueError names what does not fit.
    """
    cols, rows = x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, cols).contiguous()
    state, eps, *rest = noise or (None, None, 0, 0.0, False, False)
    check_matmul(flat, codes, scales, zeros, bias, state, eps, bits, group_size, rest[0], rest[3])
    ops_a8.check_kind("int8", zeros, bits, group_size, cols, x.device)
    _check_rows(flat, activation_bits, span)
    require("csum", csum, torch.int32, tuple(scales.shape), x)
    if ops_a8.takes_packed(bits, group_size, cols):
        y = _a8_packed_asym(flat, codes, scales, zeros, csum, span, bias, state, eps, bits, group_size, activation_bits, *rest)
    else:
        weight = None if scratch is None else weight_in(scratch, torch.int8, (rows, cols), x)
        y = _through_weight(flat, codes, scales, zeros, csum, bits, group_size, activation_bits, span, bias, noise, weight)
    return y.view(*x.shape[:-1], rows)
