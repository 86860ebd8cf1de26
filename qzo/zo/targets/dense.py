"""MeZO (arXiv 2305.17333) on the small un-quantized tensors: norms and biases.

    l+- = L(w +- eps z),   w <- w - sum_i a_i z_i

w lives in fp32 beside the model; a forward sees it, perturbed and rounded to the model's dtype, out of place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from qzo_kernels import ops
from torch import nn

from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.targets import TensorInfo


class Dense:
    """Every 1-D floating-point parameter of the model. fp32 masters [1, n]; one variant per forward (not stacked).

    `read(name)` gives a parameter's value as the checkpoint holds it, before the model's dtype rounded it.
    """

    name = "dense"
    unit = 1.0
    relative = False
    floor = float("-inf")

    def __init__(
        self, model: nn.Module, read: Callable[[str], torch.Tensor], eps: float, lr: float, gaussian: bool = False
    ):
        self.eps, self.lr, self.gaussian = eps, lr, gaussian
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        for module_name, module in model.named_modules():
            for key, value in module._parameters.items():
                if value is not None and value.dim() == 1 and value.is_floating_point():
                    self._slots[tensor_name(f"{module_name}.{key}", self.name)] = (module, key)
        check_unique(self._slots)
        self._masters = {
            name: nn.Parameter(
                read(name.removesuffix("/dense"))[None].to(module._parameters[key].device, torch.float32, copy=True), requires_grad=False
            )
            for name, (module, key) in self._slots.items()
        }
        self._info = [TensorInfo(n, tensor_uid(n), tuple(m.shape), self.floor) for n, m in self._masters.items()]

    def parameters(self) -> list[nn.Parameter]:
        return list(self._masters.values())

    def info(self) -> list[TensorInfo]:
        return self._info

    def settings(self) -> dict[str, Any]:
        return {"gaussian": self.gaussian}

    @contextmanager
    def entered(self, variants: Variants) -> Iterator[None]:
        if len(variants.signs) != 1:
            raise ValueError(f"dense tensors take one variant per forward, given {len(variants.signs)}; use stacked=false")
        stored, eps = {}, variants.signs * self.eps
        for info in self._info:
            module, key = self._slots[info.name]
            stored[info.name] = module._parameters[key]
            moved = ops.perturb(
                self._masters[info.name].data, variants.states, eps,
                info.uid, info.floor, False, self.gaussian,
            )  # fmt: skip
            module._parameters[key] = nn.Parameter(moved[0, 0].to(stored[info.name].dtype), requires_grad=False)
        try:
            yield
        finally:
            for name, value in stored.items():
                module, key = self._slots[name]
                module._parameters[key] = value

    def apply(self, state: torch.Tensor, coefs: torch.Tensor) -> None:
        for info in self._info:
            ops.update_(self._masters[info.name].data, state, coefs, info.uid, info.floor, False, self.gaussian)
        self._publish()

    def _publish(self) -> None:
        for name, (module, key) in self._slots.items():
            module._parameters[key].data.copy_(self._masters[name].data[0])

    def state(self) -> dict[str, torch.Tensor]:
        return {name: master.data for name, master in self._masters.items()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, master in self._masters.items():
            master.data.copy_(tensors[name])
        self._publish()

    def statistics(self, state: torch.Tensor) -> dict[str, Any]:
        return {}

    def warning(self, coef: float, steps: int) -> str | None:
        return None
