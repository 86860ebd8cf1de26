"""The cases of bench_kernels that move scales and codes, or perturb the scales of a whole model."""

from collections.abc import Iterator

import torch
from bench_cases import FLOOR, GROUP, LAYERS, UID, Bench, Case, Layer, Made, relative_error
from qzo_kernels import ops, reference, reference_codes
from qzo_kernels.ops_codes import update_codes_
from torch import Tensor

BLOCKS = {"13b": 40, "7b": 32, "8b": 32, "tiny": 2}
PER_BLOCK = {"gate_up": 2, "down": 1, "qkvo": 4, "qo": 2, "kv": 2}


def update_codes(bench: Bench, feedback: bool) -> Case:
    """One step of stochastic rounding on 4-bit codes, with or without the residuals of error feedback."""
    layer = bench.layer

    def make() -> Made:
        codes = [one.clone() for one in bench.weight(4).codes]
        residual = torch.zeros(layer.rows, layer.cols, dtype=torch.int16, device=bench.device) if feedback else None
        state = torch.tensor([7, 11], dtype=torch.int64, device=bench.device)
        coefs = torch.full((1, 1), 1e-3, device=bench.device)

        def call(i: int) -> None:
            update_codes_(codes[i], residual, state, coefs, UID, 4, layer.cols, 4, 2)

        def error() -> float:
            mine, exact = ([codes[0][:64].clone(), None if residual is None else residual[:64] * 0] for _ in range(2))
            update_codes_(*mine, state, coefs, UID, 4, layer.cols, 4, 2)
            reference_codes.update_codes_(*exact, state, coefs, UID, 4, layer.cols, 4, 2)
            return float((mine[0] != exact[0]).double().mean())

        return Made(call, len(codes), error=error)

    fields = bench.fields("update_codes_", bits=4, noise=True, variants=1, route="feedback" if feedback else "")
    return Case(fields, layer.rows * (layer.cols + layer.cols * 4 * feedback), 0.0, "bf16", make)


def whole_model(model: str, device: torch.device) -> Iterator[Case]:
    """perturb and update of the scales of every layer of a model."""
    shapes = [(layer.rows, layer.cols // GROUP) for layer in LAYERS[model] for _ in range(BLOCKS[model] * PER_BLOCK[layer.name])]
    bench = Bench(Layer(model, "all scales", 0, 0), device, torch.float32, 0)

    def scales() -> list[Tensor]:
        return bench.once("scales", lambda: [0.5 + torch.rand(shape, device=device) for shape in shapes])

    def make_perturb() -> Made:
        given, values = bench.noise(1), scales()

        def call(_: int) -> Tensor:
            seen = [ops.perturb(value, *given) for value in values]
            return seen[0][0]

        def expected() -> tuple[Tensor, Tensor]:
            return torch.arange(shapes[0][0], device=device), reference.perturb(values[0], *given)[0].double()

        return Made(call, 1, expected)

    def make_update() -> Made:
        state = torch.tensor([7, 11], dtype=torch.int64, device=device)
        coefs, values = torch.full((1, 1), 1e-6, device=device), [value.clone() for value in scales()]

        def call(_: int) -> None:
            for value in values:
                ops.update_(value, state, coefs, UID, FLOOR, True, False)

        def error() -> float:
            ours, exact = values[0].clone(), values[0].clone()
            ops.update_(ours, state, coefs, UID, FLOOR, True, False)
            reference.update_(exact, state, coefs, UID, FLOOR, True, False)
            return relative_error(ours, exact)

        return Made(call, 1, error=error)

    moved = 8.0 * sum(rows * cols for rows, cols in shapes)
    for op, make in (("perturb", make_perturb), ("update_", make_update)):
        yield Case(bench.fields(op, group=GROUP, noise=True, variants=1), moved, 0.0, "bf16", make)
