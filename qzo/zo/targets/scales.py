"""QZO (arXiv 2505.13430): perturb the continuous scales, keep the integer codes.

    l+- = L((s +- eps z) * (q - zero)),   s <- max(s - c, floor),   c = sum_i a_i z_i        absolute, as published
    l+- = L(s (1 +- eps z) * (q - zero)), s <- max(s (1 - c), floor)                         relative

s is fp32; the floor keeps a scale from changing sign, which would flip its whole group.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from qzo_kernels import ops

from qzo.model.linear import QuantLinear
from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.targets import TensorInfo, layers_under_noise

FLOOR = 1e-3


def floor_of(scales: torch.Tensor) -> float:
    """1e-3 of the median scale, and no more than the smallest: nothing moves before the first update."""
    return min(FLOOR * float(scales.median()), float(scales.min()))


def _check(layers: dict[str, QuantLinear]) -> None:
    given = type(layers).__name__
    if isinstance(layers, dict):
        others = (f"{type(layer).__name__} {name}" for name, layer in layers.items() if not isinstance(layer, QuantLinear))
        given = next(others, "" if layers else "an empty dict")
    if given:
        raise ValueError(f"Scales: given {given}; expected QuantLinears by name. A prepared model has them: "
                         "qzo.Scales(qzo.prepare(model), eps=..., lr=...)")  # fmt: skip


class Scales:
    """The scales of every QuantLinear. `layers` maps module names to layers (`qzo.prepare`); order of the map is order of update.

    Raises ValueError for layers of another class, or none.
    """

    name = "scales"
    unit = 1.0

    def __init__(
        self, layers: dict[str, QuantLinear], eps: float, lr: float, relative: bool = True, gaussian: bool = False
    ):
        _check(layers)
        self.eps, self.lr, self.relative, self.gaussian = eps, lr, relative, gaussian
        self.layers = {tensor_name(name, self.name): layer for name, layer in layers.items()}
        check_unique(self.layers)
        self._info = [
            TensorInfo(name, tensor_uid(name), tuple(layer.scales.shape), floor_of(layer.scales))
            for name, layer in self.layers.items()
        ]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [layer.scales for layer in self.layers.values()]

    def info(self) -> list[TensorInfo]:
        return self._info

    def settings(self) -> dict[str, Any]:
        return {"gaussian": self.gaussian}

    def entered(self, variants: Variants) -> AbstractContextManager[None]:
        eps = variants.signs * self.eps
        return layers_under_noise(self.layers.values(), (ops.Noise(variants.states, eps, info.uid, info.floor, self.relative, self.gaussian) for info in self._info))

    def apply(self, state: torch.Tensor, coefs: torch.Tensor) -> None:
        for info, layer in zip(self._info, self.layers.values(), strict=True):
            ops.update_(layer.scales.data, state, coefs, info.uid, info.floor, self.relative, self.gaussian)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: layer.scales.data for name, layer in self.layers.items()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.scales.data.copy_(tensors[name])

    def statistics(self, state: torch.Tensor) -> dict[str, Any]:
        return {}

    def warning(self, coef: float, steps: int) -> str | None:
        return None
