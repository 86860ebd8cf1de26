"""What bench_kernels measures: operators on the linear layers of known models, their cost, and what they should give.

A case is made lazily, so that one that cannot run is a row with its reason.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from qzo_kernels import ops, reference
from qzo_kernels.pack import tiled_words, untile_codes
from torch import Tensor
from torch.nn import functional

GROUP = 128
EPS, FLOOR, UID = 0.03, 1e-6, 20260101
SAMPLE = 256  # rows of a product that are compared with fp64


@dataclass(frozen=True)
class Layer:
    model: str
    name: str
    rows: int  # N
    cols: int  # K


LAYERS = {
    "13b": [Layer("13b", "gate_up", 13824, 5120), Layer("13b", "down", 5120, 13824), Layer("13b", "qkvo", 5120, 5120)],
    "7b": [Layer("7b", "gate_up", 11008, 4096), Layer("7b", "down", 4096, 11008), Layer("7b", "qkvo", 4096, 4096)],
    "8b": [Layer("8b", "gate_up", 14336, 4096), Layer("8b", "down", 4096, 14336), Layer("8b", "qo", 4096, 4096), Layer("8b", "kv", 1024, 4096)],
    "tiny": [Layer("tiny", "gate_up", 192, 128), Layer("tiny", "down", 64, 256)],
}  # fmt: skip


@dataclass
class Made:
    """`call(i)` runs the operator on weight set i; `expected()` is (rows, their exact fp64 values) for set 0.

    An operator that works in place gives its own relative `error()` instead.
    """

    call: Callable[[int], Tensor | None]
    sets: int
    expected: Callable[[], tuple[Tensor, Tensor]] | None = None
    error: Callable[[], float] | None = None


@dataclass
class Case:
    """One row of the table: `fields` of it, the bytes and operations that it cannot do without, and how to make it."""

    fields: dict[str, Any]
    moved: float
    operations: float
    unit: str
    make: Callable[[], Made]
    own_setting: bool = field(default=True)  # False: with PyTorch's default of reduced-precision reductions


@dataclass
class Weight:
    """Quantized [N, K] with random codes, as many copies as it takes to outgrow the cache."""

    layer: Layer
    bits: int
    codes: list[Tensor]
    scales: list[Tensor]

    def seen(self, noise: ops.Noise | None) -> Tensor:
        """f32 [V, N, G] of set 0."""
        return self.scales[0][None] if noise is None else reference.perturb(self.scales[0], *noise)

    def exact(self, scales: Tensor) -> Tensor:
        """fp64 [N, K] of set 0 under f32 [N, G]."""
        w = untile_codes(self.codes[0], self.bits, self.layer.cols).double().unflatten(1, (-1, GROUP))
        return ((w - (1 << (self.bits - 1))) * scales.double()[:, :, None]).flatten(1)


class Bench:
    """The tensors of one layer, made when first asked for, on `device`; `cache` is what a rotation must outgrow, in bytes."""

    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype, cache: int):
        self.layer, self.device, self.dtype, self.cache = layer, device, dtype, cache
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def sets(self, size: int) -> int:
        return min(64, self.cache // size + 1)

    def weight(self, bits: int) -> Weight:
        return self.once(("weight", bits), partial(self._weight, bits))

    def _weight(self, bits: int) -> Weight:
        rows, cols = self.layer.rows, self.layer.cols
        words = tiled_words(cols, bits)
        count = self.sets(rows * words * 4)
        # Where K is a multiple of 128 every word is a valid one.
        codes = [torch.randint(-(1 << 31), 1 << 31, (rows, words), dtype=torch.int32, device=self.device) for _ in range(count)]
        scales = [(0.5 + torch.rand(rows, cols // GROUP, device=self.device)) * 2.0 ** (-4 - bits) for _ in range(count)]
        return Weight(self.layer, bits, codes, scales)

    def dense(self) -> list[Tensor]:
        shape = (self.layer.rows, self.layer.cols)
        count = self.sets(2 * shape[0] * shape[1])
        return self.once("dense", lambda: [torch.randn(shape, device=self.device).mul_(0.02).to(self.dtype) for _ in range(count)])

    def bytewise(self, dtype: torch.dtype) -> list[Tensor]:
        """int8 or e4m3 weights [N, K]."""
        shape = (self.layer.rows, self.layer.cols)
        count = self.sets(shape[0] * shape[1])
        return self.once(dtype, lambda: [torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device).to(dtype) for _ in range(count)])

    def x(self, m: int) -> Tensor:
        return self.once(("x", m), lambda: torch.randn(m, self.layer.cols, device=self.device).to(self.dtype))

    def scratch(self) -> Tensor:
        size = self.layer.rows * self.layer.cols * self.dtype.itemsize
        return self.once("scratch", lambda: torch.empty(size, dtype=torch.uint8, device=self.device))

    def noise(self, variants: int) -> ops.Noise:
        """One direction, +; one direction, both signs; or as many directions as variants."""
        return self.once(("noise", variants), partial(self._noise, variants))

    def _noise(self, variants: int) -> ops.Noise:
        rows = [[7, 11, v if variants > 2 else 0] for v in range(variants)]
        signs = [-EPS if v % 2 else EPS for v in range(variants)]
        state, eps = torch.tensor(rows, dtype=torch.int64), torch.tensor(signs, dtype=torch.float32)
        return ops.Noise(state.to(self.device), eps.to(self.device), UID, FLOOR, True, False)

    def product(self, x: Tensor, weights: Sequence[Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
        """(rows, exact values) of a sample of x's rows, block v of x against the weight that weights[v] makes."""
        block = x.shape[0] // len(weights)
        each = min(block, max(1, SAMPLE // len(weights)))
        inside = torch.linspace(0, block - 1, each, device=self.device).round().long()
        parts = [x[v * block + inside].double() @ make().double().t() for v, make in enumerate(weights)]
        return torch.cat([v * block + inside for v in range(len(weights))]), torch.cat(parts)

    def fields(self, op: str, m: int = 0, **others: Any) -> dict[str, Any]:
        layer = self.layer
        return {"op": op, "model": layer.model, "layer": layer.name, "N": layer.rows, "K": layer.cols, "M": m, **others}

    def quantized(self, bits: int, noise: int, route: str = "") -> dict[str, Any]:
        return {"bits": bits, "group": GROUP, "sym": True, "noise": noise > 0, "variants": max(1, noise), "route": route}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Of the Frobenius norm; infinite where anything is not finite."""
    difference = float((got.double() - exact.double()).norm() / exact.double().norm())
    return difference if math.isfinite(difference) else math.inf


def weight_bytes(layer: Layer, bits: int) -> int:
    return layer.rows * (tiled_words(layer.cols, bits) * 4 + layer.cols // GROUP * 4)


def activation_bytes(layer: Layer, m: int, out: int = 2) -> int:
    return m * (2 * layer.cols + out * layer.rows)


def linear(bench: Bench, m: int) -> Case:
    layer = bench.layer

    def make() -> Made:
        x, w = bench.x(m), bench.dense()
        return Made(lambda i: functional.linear(x, w[i]), len(w), lambda: bench.product(x, [lambda: w[0]]))

    moved = 2 * layer.rows * layer.cols + activation_bytes(layer, m)
    return Case(bench.fields("cublas", m, route="bf16"), moved, 2.0 * m * layer.rows * layer.cols, "bf16", make, own_setting=False)


def quant_matmul(bench: Bench, m: int, bits: int = 4, noise: int = 0, route: str = "auto") -> Case:
    """`noise`: the number of its variants, 0 for none."""
    layer = bench.layer

    def make() -> Made:
        x, w, scratch = bench.x(m), bench.weight(bits), bench.scratch()
        given = bench.noise(noise) if noise else None
        forced = {} if route == "auto" else {"route": route}

        def call(i: int) -> Tensor:
            return ops.quant_matmul(x, w.codes[i], w.scales[i], None, bits, GROUP, None, given, scratch, **forced)

        return Made(call, len(w.codes), lambda: bench.product(x, [partial(w.exact, s) for s in w.seen(given)]))

    moved = weight_bytes(layer, bits) + activation_bytes(layer, m)
    return Case(bench.fields("quant_matmul", m, **bench.quantized(bits, noise, route)), moved, 2.0 * m * layer.rows * layer.cols, "bf16", make)


def two_halves(bench: Bench, m: int, bits: int = 4) -> Case:
    """What variants in one launch are measured against: two launches of half the rows, one variant each."""
    layer = bench.layer

    def make() -> Made:
        x, w, scratch = bench.x(m), bench.weight(bits), bench.scratch()
        both = bench.noise(2)
        single = [both._replace(state=both.state[v : v + 1].clone(), eps=both.eps[v : v + 1].clone()) for v in range(2)]

        def call(i: int) -> Tensor:
            first, second = x.chunk(2)
            ops.quant_matmul(first, w.codes[i], w.scales[i], None, bits, GROUP, None, single[0], scratch)
            return ops.quant_matmul(second, w.codes[i], w.scales[i], None, bits, GROUP, None, single[1], scratch)

        return Made(call, len(w.codes), lambda: bench.product(x.chunk(2)[1], [partial(w.exact, w.seen(single[1])[0])]))

    fields = bench.fields("two_halves", m, **bench.quantized(bits, 1, "auto"))
    return Case(fields, 2 * weight_bytes(layer, bits) + activation_bytes(layer, m), 2.0 * m * layer.rows * layer.cols, "bf16", make)


def dequantize(bench: Bench, noise: int) -> Case:
    layer = bench.layer

    def make() -> Made:
        w, outs = bench.weight(4), torch.empty(2, layer.rows, layer.cols, dtype=bench.dtype, device=bench.device)
        given = bench.noise(1) if noise else None

        def call(i: int) -> Tensor:
            return ops.dequantize(w.codes[i], w.scales[i], None, 4, GROUP, layer.cols, bench.dtype, outs[min(i, 1)], given)

        def expected() -> tuple[Tensor, Tensor]:
            return torch.arange(layer.rows, device=bench.device), w.exact(w.seen(given)[0])

        return Made(call, len(w.codes), expected)

    fields = bench.fields("dequantize", **bench.quantized(4, noise))
    return Case(fields, weight_bytes(layer, 4) + 2 * layer.rows * layer.cols, 0.0, "bf16", make)
