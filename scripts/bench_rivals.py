"""The cases of bench_kernels with low-bit activations, and those of other libraries' kernels, where they run."""

from functools import partial

import torch
from bench_cases import GROUP, Bench, Case, Made, activation_bytes, quant_matmul, weight_bytes
from qzo_kernels.pack import tile_codes
from torch import Tensor

LARGEST = {"int8": 127.0, "fp8": 448.0}
SLOW_ABOVE = 1024  # rows from which torch's int4 kernel, made for few rows, is not waited for


def rounded(x: Tensor, kind: str) -> Tensor:
    """x as the product sees it, fp64: one symmetric scale per row, 8 bits per value."""
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True)
    q = wide * (LARGEST[kind] / top)
    q = q.round() if kind == "int8" else q.to(torch.float8_e4m3fn)
    return q.double() * (top / LARGEST[kind]).double()


def low_bit(bench: Bench, m: int, bits: int, kind: str) -> Case:
    """W4A8 and W8A8 from packed symmetric codes, with noise; the activations' quantization is part of it."""
    like = quant_matmul(bench, m, bits, 1)

    def make() -> Made:
        from qzo_kernels import ops_a8

        x, w, scratch, noise = bench.x(m), bench.weight(bits), bench.scratch(), bench.noise(1)

        def call(i: int) -> Tensor:
            return ops_a8.quant_matmul_a8(x, w.codes[i], w.scales[i], None, bits, GROUP, kind, None, noise, scratch)

        return Made(call, len(w.codes), lambda: bench.product(rounded(x, kind), [partial(w.exact, w.seen(noise)[0])]))

    return Case(like.fields | {"op": f"w{bits}a8", "route": kind}, like.moved, like.operations, kind, make)


def stored_fp8(bench: Bench, m: int) -> Case:
    """W8A8 with weights that are e4m3 themselves, with noise on their scales."""
    layer, like = bench.layer, quant_matmul(bench, m, 8, 1)

    def make() -> Made:
        from qzo_kernels import ops_a8

        x, w, noise, held = bench.x(m), bench.bytewise(torch.float8_e4m3fn), bench.noise(1), bench.weight(8)
        codes = bench.once("tiled fp8", lambda: [tile_codes(one.view(torch.uint8), 8) for one in w])

        def call(i: int) -> Tensor:
            return ops_a8.quant_matmul_a8(x, codes[i], held.scales[0], None, 8, GROUP, "fp8", None, noise)

        def weight() -> Tensor:
            return (w[0].double().unflatten(1, (-1, GROUP)) * held.seen(noise)[0].double()[:, :, None]).flatten(1)

        return Made(call, len(codes), lambda: bench.product(rounded(x, "fp8"), [weight]))

    return Case(like.fields | {"op": "w8a8", "route": "fp8"}, like.moved, 2.0 * m * layer.rows * layer.cols, "fp8", make)


def int_mm(bench: Bench, m: int) -> Case:
    """The int8 product alone, without scales."""
    layer = bench.layer

    def make() -> Made:
        w = bench.bytewise(torch.int8)
        x = torch.randint(-127, 128, (m, layer.cols), dtype=torch.int8, device=bench.device)
        return Made(lambda i: torch._int_mm(x, w[i].t()), len(w), lambda: bench.product(x, [lambda: w[0]]))

    moved = layer.rows * layer.cols + m * (layer.cols + 4 * layer.rows)
    return Case(bench.fields("torch int_mm", m, bits=8, route="int8"), moved, 2.0 * m * layer.rows * layer.cols, "int8", make)


def _plain(bench: Bench) -> tuple[list[Tensor], Tensor]:
    """(int4 codes as bytes uint8 [N, K/2], even columns in the high half; scales [N, G])."""
    layer = bench.layer

    def make() -> tuple[list[Tensor], Tensor]:
        count = bench.sets(layer.rows * layer.cols // 2)
        codes = [torch.randint(0, 256, (layer.rows, layer.cols // 2), dtype=torch.uint8, device=bench.device) for _ in range(count)]
        return codes, ((0.5 + torch.rand(layer.rows, layer.cols // GROUP, device=bench.device)) / 256).to(bench.dtype)

    return bench.once("plain", make)


def _nibbles(codes: Tensor) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], 2).flatten(1)


def _exact(codes: Tensor, scales: Tensor) -> Tensor:
    grouped = _nibbles(codes).double().unflatten(1, (-1, GROUP)) - 8
    return (grouped * scales.double()[:, :, None]).flatten(1)


def torch_int4(bench: Bench, m: int) -> Case:
    def make() -> Made:
        if m > SLOW_ABOVE:
            raise NotImplementedError(f"not timed above {SLOW_ABOVE} rows")
        codes, scales = _plain(bench)
        packed = bench.once("torch int4", lambda: [torch._convert_weight_to_int4pack(c, 8) for c in codes])
        both = torch.stack([scales.t(), torch.zeros_like(scales.t())], 2).contiguous()
        x = bench.x(m)
        return Made(lambda i: torch._weight_int4pack_mm(x, packed[i], GROUP, both), len(packed),
                    lambda: bench.product(x, [lambda: _exact(codes[0], scales)]))  # fmt: skip

    return _rival(bench, m, "torch int4pack_mm", make)


def gemlite(bench: Bench, m: int) -> Case:
    def make() -> Made:
        from gemlite.helper import A16Wn

        codes, scales = _plain(bench)

        def pack() -> list:
            eights = torch.full_like(scales, 8).reshape(-1, 1)
            packer = A16Wn(device=str(bench.device))
            return [packer.from_weights(_nibbles(c), scales.reshape(-1, 1), eights, 4, GROUP) for c in codes]

        linears, x = bench.once("gemlite", pack), bench.x(m)
        return Made(lambda i: linears[i](x), len(linears), lambda: bench.product(x, [lambda: _exact(codes[0], scales)]))

    return _rival(bench, m, "gemlite", make)


def _rival(bench: Bench, m: int, op: str, make) -> Case:
    like = quant_matmul(bench, m)
    return Case(like.fields | {"op": op, "route": ""}, like.moved, like.operations, "bf16", make)
