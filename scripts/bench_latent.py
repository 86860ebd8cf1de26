"""The cases of bench_kernels that are ZeroQAT's: latent weights under noise on their grid, and their updates."""

from collections.abc import Callable

import torch
from bench_cases import UID, Bench, Case, Made, relative_error
from qzo_kernels import ops_qat, reference_qat
from qzo_kernels.reference_noise import rademacher
from torch import Tensor

BITS, GROUP = 4, -1
CHECKED = 64  # rows that are compared with the reference


class _Latents:
    """fp32 weights [N, K] of a layer, as many as outgrow the cache, the grid of the first one, the sites' divisors and both signs' noise."""

    def __init__(self, bench: Bench):
        shape, device = (bench.layer.rows, bench.layer.cols), bench.device
        self.weights = [torch.randn(shape, device=device).mul_(0.02) for _ in range(bench.sets(4 * shape[0] * shape[1]))]
        self.s_in, self.s_out = (0.5 + torch.rand(size, device=device) for size in (shape[1], shape[0]))
        self.step, self.zero = reference_qat.clipped_grid(self.weights[0] * self.s_in / self.s_out[:, None], BITS, GROUP)
        state, eps, uid, _, _, _ = bench.noise(2)
        self.noise = ops_qat.LatentNoise(state, eps, uid, self.step * self.s_out[:, None], 1 / self.s_in, False)

    def top(self, count: int) -> tuple[Tensor, ...]:
        """The first rows of (weight, step, zero, s_out, rows of the unit)."""
        parts = (self.weights[0], self.step, self.zero, self.s_out, self.noise.rows)
        return tuple(part[:count].clone() for part in parts)


def _expected(bench: Bench, latents: _Latents, noise: bool) -> tuple[Tensor, Tensor]:
    weight, step, zero, s_out, rows = latents.top(CHECKED)
    given = latents.noise._replace(rows=rows) if noise else None
    seen = reference_qat.effective_weight(weight, step, zero, BITS, GROUP, bench.dtype, latents.s_in, s_out, given)
    return torch.arange(len(weight), device=bench.device), seen[0].double()


def _forward(bench: Bench, variants: int, call_of: Callable[[_Latents], Callable[[int], Tensor]], route: str) -> Case:
    size = bench.layer.rows * bench.layer.cols

    def make() -> Made:
        latents = bench.once("latents", lambda: _Latents(bench))
        return Made(call_of(latents), len(latents.weights), lambda: _expected(bench, latents, variants > 0))

    fields = bench.fields("effective_weight", bits=BITS, group=GROUP, noise=variants > 0, variants=max(1, variants), route=route)
    return Case(fields, size * (4.0 + max(1, variants) * bench.dtype.itemsize), 0.0, "bf16", make)


def effective_weight(bench: Bench, variants: int) -> Case:
    """`variants`: 2 for both signs of a direction, 0 for no noise."""

    def call_of(latents: _Latents) -> Callable[[int], Tensor]:
        noise = latents.noise if variants else None
        tail = (latents.step, latents.zero, BITS, GROUP, bench.dtype, latents.s_in, latents.s_out, noise)
        return lambda i: ops_qat.effective_weight(latents.weights[i], *tail)

    return _forward(bench, variants, call_of, "")


def eager(bench: Bench) -> Case:
    """Both signs by PyTorch's own operations, one after another, with the noise already in memory."""

    def call_of(latents: _Latents) -> Callable[[int], Tensor]:
        noise, (seed, step, direction) = latents.noise, latents.noise.states[0].tolist()
        u = rademacher(latents.weights[0].shape, seed, step, direction, noise.uid, bench.device)
        moved = noise.rows * noise.cols * u

        def call(i: int) -> Tensor:
            seen = [(latents.weights[i] + moved * e) * latents.s_in / latents.s_out[:, None] for e in noise.eps]
            return torch.stack([reference_qat.fake_quantize(w, latents.step, latents.zero, BITS, GROUP).to(bench.dtype) for w in seen])

        return call

    return _forward(bench, 2, call_of, "eager")


def copy(bench: Bench) -> Case:
    """As many bytes as effective_weight reads and writes for both signs, moved by one operation and nothing else."""
    moved = bench.layer.rows * bench.layer.cols * (4.0 + 2 * bench.dtype.itemsize)

    def make() -> Made:
        sources = [torch.ones(int(moved) // 8, device=bench.device) for _ in range(bench.sets(int(moved) // 2))]
        target = torch.empty_like(sources[0])
        return Made(lambda i: torch.neg(sources[i], out=target), len(sources), error=lambda: 0.0)

    return Case(bench.fields("copy", variants=2, noise=True, route="effective_weight"), moved, 0.0, "bf16", make)


def update_latent(bench: Bench) -> Case:
    """One step along one direction."""

    def make() -> Made:
        latents = bench.once("latents", lambda: _Latents(bench))
        state, coefs = latents.noise.states[0, :2].clone(), torch.full((1, 1), 1e-3, device=bench.device)
        weights = [one.clone() for one in latents.weights]

        def call(i: int) -> None:
            ops_qat.update_latent_(weights[i], state, coefs, UID, GROUP, latents.noise.rows, latents.noise.cols, False)

        def error() -> float:
            ours, _, _, _, rows = latents.top(CHECKED)
            exact = ours.clone()
            for move, weight in ((ops_qat.update_latent_, ours), (reference_qat.update_latent_, exact)):
                move(weight, state, coefs, UID, GROUP, rows, latents.noise.cols, False)
            return relative_error(ours, exact)

        return Made(call, len(weights), error=error)

    fields = bench.fields("update_latent_", bits=BITS, group=GROUP, noise=True, variants=1)
    return Case(fields, 8.0 * bench.layer.rows * bench.layer.cols, 0.0, "bf16", make)


def latent(bench: Bench) -> list[Case]:
    return [effective_weight(bench, 0), effective_weight(bench, 2), eager(bench), copy(bench), update_latent(bench)]
