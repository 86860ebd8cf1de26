"""QuZO (arXiv 2502.12346): perturb and move the integer codes, keep the scales. All lengths are in grid steps.

    l+- = L(s * (q - zero +- eps u1)),   q <- q - sum_i round(a_i u_i),   a_i = lr d_i / n

u1 and u2 are two conditionally independent stochastic roundings of one integer normal to `noise_bits`, clipped at 4 sigma.
estimator "rge2", as published: u = u2. "rge1": u = u1, whose only bias, the gain E[u1^2], is divided out; its noise is lower.
feedback: what a rounding leaves over is kept, int16 per weight, and added to the next step's.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from qzo_kernels import ops_codes, ops_noisy
from qzo_kernels.pack import untile_codes

from qzo.model.linear import QuantLinear
from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.quantized import STREAMS, level, mean_move, sampled, unit, walk
from qzo.zo.targets import TensorInfo, layers_under_noise


class Codes:
    """The codes of every QuantLinear [N, K], columns in the order in which they are stored (sorted by group).

    `layers` maps module names to layers; order of the map is order of update. estimator: rge1 | rge2; noise_bits 2 to 8.
    """

    name = "codes"
    relative = True

    def __init__(
        self, layers: dict[str, QuantLinear], eps: float, lr: float, noise_bits: int = 4, estimator: str = "rge1", feedback: bool = True
    ):
        self.eps, self.lr, self.noise_bits = eps, lr, noise_bits
        self.stream, self.unit = STREAMS[estimator], unit(noise_bits, estimator)
        self.layers = {tensor_name(name, self.name): layer for name, layer in layers.items()}
        check_unique(self.layers)
        self._info = [
            TensorInfo(name, tensor_uid(name), (layer.out_features, layer.in_features), float("-inf")) for name, layer in self.layers.items()
        ]
        self.bits = next(iter(layers.values())).bits
        self._residuals = {
            info.name: torch.zeros(info.shape, dtype=torch.int16, device=self.layers[info.name].codes.device) if feedback else None
            for info in self._info
        }
        self.feedback = feedback

    def parameters(self) -> list[torch.Tensor]:
        return [layer.codes for layer in self.layers.values()]

    def info(self) -> list[TensorInfo]:
        return self._info

    def settings(self) -> dict[str, Any]:
        return {"noise_bits": self.noise_bits, "stream": self.stream, "bits": self.bits, "feedback": self.feedback}

    def entered(self, variants: Variants) -> AbstractContextManager[None]:
        eps = variants.signs * (self.eps * level(self.noise_bits))
        return layers_under_noise(self.layers.values(), (ops_noisy.CodeNoise(variants.states, eps, info.uid, self.noise_bits, variants.paired) for info in self._info))

    def apply(self, state: torch.Tensor, coefs: torch.Tensor) -> None:
        for info, layer in zip(self._info, self.layers.values(), strict=True):
            residual = self._residuals[info.name]
            ops_codes.update_codes_(layer.codes, residual, state, coefs, info.uid, self.bits, info.shape[1], self.noise_bits, self.stream)

    def state(self) -> dict[str, torch.Tensor]:
        found = {name: layer.codes for name, layer in self.layers.items()}
        return found | {residual_name(name): value for name, value in self._residuals.items() if value is not None}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])

    def statistics(self, state: torch.Tensor) -> dict[str, Any]:
        """Where the codes are: the smallest and the largest, the share at either end of the grid; the residuals' mean square, in grid steps;
        the noise of the first layer."""
        top, low, high, edge, count, square = (1 << self.bits) - 1, [], [], 0, 0, 0.0
        for info, layer in zip(self._info, self.layers.values(), strict=True):
            q = untile_codes(layer.codes, self.bits, info.shape[1])
            low.append(int(q.min()))
            high.append(int(q.max()))
            edge += int(((q == 0) | (q == top)).sum())
            count += q.numel()
            if (residual := self._residuals[info.name]) is not None:
                square += float(residual.double().square().sum()) / 2.0**32
        found = {"codes": count, "smallest": min(low), "largest": max(high), "saturated": edge / count}
        found["noise"] = sampled(self._info[0], state, self.noise_bits)
        return found | ({"residual_mean_square": square / count, "residual_bytes": 2 * count} if self.feedback else {})

    def warning(self, coef: float, steps: int) -> str | None:
        """What is wrong with moving by `coef` (typical size of a recorded coefficient, all directions together) for `steps` more steps.

        None where codes move, and stay on their grid.
        """
        move, top = coef * mean_move(self.noise_bits) / level(self.noise_bits), (1 << self.bits) - 1
        chance, rounding = move * steps**0.5, walk(coef / level(self.noise_bits), steps, self.noise_bits)
        said = f"a step moves a code by {move:.2g} of a grid step, {steps} steps by {move * steps:.2g} at most and {chance:.2g} by chance"
        if self.feedback and move * steps < 0.5:
            return f"{said}: no code will ever change. Raise lr."
        # Half a step is beyond four standard deviations; or one rounding in a thousand goes up.
        if 4 * chance < 0.5 if self.feedback else move * steps < 1e-3:
            return f"{said}: hardly a code will ever change. Raise lr."
        # A sixteenth of the grid is one step of 4 bits: as much as quantizing again.
        if not self.feedback and rounding > top / 16:
            return f"{said}; its rounding alone moves it by {rounding:.2g}, of a grid of {top} steps. Use feedback: true, or lower lr."
        if chance > top / 4:
            return f"{said}, of a grid of {top} steps: codes will pile up at its ends. Lower lr."
        return None


def residual_name(name: str) -> str:
    """Of the residual that belongs to codes of this name."""
    return name.removesuffix("/codes") + "/residual"
