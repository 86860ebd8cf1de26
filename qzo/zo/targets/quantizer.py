"""The quantizer of ZeroQAT (arXiv 2509.00031): clipping, steps, zeros, spans and smoothing moved by ZO, with the weights or without.

    l± = L(Q(W; p ± ε z)),   p ← p - c          absolute: low, high (logits), move (grid steps), shift
    l± = L(Q(W; p (1 ± ε z))),   p ← p (1 - c)  relative: factor, span, scale

    part       clipping   step    zero  span  scale            shift
    tensors    low, high  factor  move  span  scale of sites   shift of sites, in units of its mean size

Of each sign a grid is made (qzo/model/qat.py); the weights of the pair are the same.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from qzo_kernels import ops
from torch import Tensor, nn

from qzo.model.qat import FakeQuantLinear
from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.targets import TensorInfo
from qzo.zo.targets.scales import floor_of

PARTS = {"clipping": ("low", "high"), "step": ("factor",), "zero": ("move",), "span": ("span",), "scale": ("scale",), "shift": ("shift",)}
_RELATIVE = ("factor", "span", "scale")
_LEAST_UNIT = 1e-8


def moves_relative(name: str) -> bool:
    """Whether the tensor of this name moves by a share of itself."""
    return name.removesuffix("/quantizer").rpartition(".")[2] in _RELATIVE


def shift_quantizer_(values: Tensor, state: Tensor, coefs: Tensor, uid: int, name: str, floor: float, unit: float, gaussian: bool) -> None:
    """What `Quantizer.apply` does to one tensor: values fp32 [rows, cols] in place; state int64 [2], coefs fp32 [S, D]; unit: an fp32 number."""
    ops.update_(values, state, coefs * unit, uid, floor, moves_relative(name), gaussian)


def _mean_size(values: Tensor) -> float:
    """mean |value| as an fp32 number, at least _LEAST_UNIT."""
    # Exact before it is rounded: a run that goes on on another device, or with other threads, must find the unit of its journal.
    mean = math.fsum(values.abs().flatten().tolist()) / values.numel()
    return torch.tensor(max(mean, _LEAST_UNIT), dtype=torch.float32).item()


class Quantizer:
    """The tensors of `parts` in the prepared layers of a model; of 1-D ones [1, n]. One variant per forward (not stacked).

    ValueError for an unknown part, or where no layer has such tensors.
    """

    name = "quantizer"
    unit = 1.0
    relative = False

    def __init__(self, model: nn.Module, parts: Collection[str], eps: float, lr: float, gaussian: bool = False):
        if not parts or not set(parts) <= PARTS.keys():
            raise ValueError(f"Quantizer: parts {', '.join(parts) or 'none'}; expected some of {', '.join(PARTS)}")
        self.eps, self.lr, self.gaussian = eps, lr, gaussian
        wanted = {key for part in parts for key in PARTS[part]}
        self._linears = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        for layer_name, layer in model.named_modules():
            if hasattr(layer, "sites"):
                for inner, module in layer.named_modules():
                    if isinstance(module, FakeQuantLinear) or inner.startswith("sites."):
                        keys = [key for key, value in module._parameters.items() if key in wanted and value is not None]
                        self._slots |= {tensor_name(f"{layer_name}.{inner}.{key}".lstrip("."), self.name): (module, key) for key in keys}
        if not self._slots:
            raise ValueError(f"Quantizer: a model without {', '.join(sorted(wanted))}; expected prepared layers that have some")
        check_unique(self._slots)
        self._info, self._units = [], {}
        for name, value in self.state().items():
            floor = floor_of(value) if moves_relative(name) else float("-inf")
            self._info.append(TensorInfo(name, tensor_uid(name), tuple(value.shape), floor))
            self._units[name] = _mean_size(value) if self._slots[name][1] == "shift" else 1.0

    def parameters(self) -> list[nn.Parameter]:
        return [module._parameters[key] for module, key in self._slots.values()]

    def info(self) -> list[TensorInfo]:
        return self._info

    def settings(self) -> dict[str, Any]:
        return {"gaussian": self.gaussian, "units": {name: unit for name, unit in self._units.items() if unit != 1.0}}

    @contextmanager
    def entered(self, variants: Variants) -> Iterator[None]:
        if len(variants.signs) != 1:
            raise ValueError(f"a quantizer takes one variant per forward, given {len(variants.signs)}; use stacked=false")
        eps, stored = variants.signs * self.eps, {}
        for info, value in zip(self._info, self.state().values(), strict=True):
            module, key = self._slots[info.name]
            stored[info.name] = old = module._parameters[key]
            moved = ops.perturb(value, variants.states, eps * self._units[info.name], info.uid, info.floor, moves_relative(info.name), self.gaussian)
            module._parameters[key] = nn.Parameter(moved.view(old.shape), requires_grad=False)
        grids = [(linear.step, linear.zero, linear.offset) for linear in self._linears]
        for linear in self._linears:
            linear.step, linear.zero = linear.grid()
            linear.offset = linear.shifted()
        try:
            yield
        finally:
            for name, old in stored.items():
                module, key = self._slots[name]
                module._parameters[key] = old
            for linear, grid in zip(self._linears, grids, strict=True):
                linear.step, linear.zero, linear.offset = grid

    def apply(self, state: Tensor, coefs: Tensor) -> None:
        for info, value in zip(self._info, self.state().values(), strict=True):
            shift_quantizer_(value, state, coefs, info.uid, info.name, info.floor, self._units[info.name], self.gaussian)
        self._refresh()

    def _refresh(self) -> None:
        for linear in self._linears:
            linear.refresh()

    def state(self) -> dict[str, Tensor]:
        return {name: torch.atleast_2d(module._parameters[key].data) for name, (module, key) in self._slots.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])
        self._refresh()

    def statistics(self, state: Tensor) -> dict[str, Any]:
        """Mean, smallest and largest of what each part's tensors hold."""
        found: dict[str, list[Tensor]] = {}
        for name, value in self.state().items():
            found.setdefault(self._slots[name][1], []).append(value.flatten())
        joined = {key: torch.cat(values) for key, values in found.items()}
        return {key: {"mean": float(v.mean()), "smallest": float(v.min()), "largest": float(v.max())} for key, v in joined.items()}

    def warning(self, coef: float, steps: int) -> str | None:
        return None
