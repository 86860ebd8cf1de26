"""LoRA (arXiv 2106.09685) on a frozen quantized base, trained with quantized noise: QuZO (arXiv 2502.12346).

    y = x Wᵀ + delta,   delta = alpha/r (x Aᵀ) Bᵀ
    l+- = L(w +- eps 4/L u),   w <- w - sum_i c_i u_i        w: A and B, u: quantized normals, L: their largest level

In the forwards u = Q1(z). The update moves along the same u with the gain divided out (rge1), or along Q2(z) (rge2, the paper).
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from qzo_kernels import ops_noisy, reference
from torch import Tensor, nn

from qzo.model.linear import QuantLinear
from qzo.zo import quantized
from qzo.zo.noise import Variants, check_unique, tensor_name, tensor_uid
from qzo.zo.targets import TensorInfo

MODULES = ("q_proj", "v_proj")
_INITIAL = 7  # stream of initial values, at step 0: no other draw uses it
_ALIGN = 16  # elements: every tensor begins at an address that kernels like


def initial(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """fp32 on the CPU: 0 for a lora_B; for a lora_A uniform within ±1/√cols, as peft's kaiming_uniform_(a=√5).

    A function of (seed, name, shape) alone, by noise version 1: (2·uniform24 + 1 - 2²⁴)·(2⁻²⁴/√cols), the same bits everywhere.
    """
    if name.endswith(".lora_B/lora"):
        return torch.zeros(shape)
    odd = 2 * reference.uniform24(shape, seed, 0, 0, tensor_uid(name), _INITIAL) + 1 - (1 << 24)
    return odd.to(torch.float32) * (2.0**-24 / math.sqrt(shape[1]))


def replay_(values: Tensor, state: Tensor, coefs: Tensor, uid: int, noise_bits: int, stream: int) -> None:
    """What `Lora.apply` does to one tensor: values fp32 [rows, cols] in place; state int64 [2], coefs fp32 [S, D]; a coef of 0 moves nothing."""
    _descend_(values, state, coefs, lambda at, out: ops_noisy.code_noise(*values.shape, at, uid, noise_bits, stream, out))


def _descend_(values: Tensor, state: Tensor, coefs: Tensor, draw: Callable[[Tensor, Tensor], object]) -> None:
    """For each step: values -= sum_i c_i u_i, in fp32, one rounding per operation; draw(state int64 [3], out) fills int8 like values."""
    steps, directions = (torch.arange(n, device=values.device) for n in coefs.shape)
    states = torch.stack(torch.broadcast_tensors(state[0], state[1] + steps[:, None], directions), -1)
    u = torch.zeros_like(values, dtype=torch.int8)
    for row, at in zip(coefs, states, strict=True):
        # From +0, so that a sum of zeros leaves a -0 as it is.
        total = torch.zeros_like(values)
        for c, one in zip(row, at, strict=True):
            draw(one, u)
            # Not addcmul, which rounds once.
            total += u.float() * c
        values -= total


class _Adapter:
    """x [V·B, ..., K] -> delta [V·B, ..., N] of x's dtype; part v of x sees a[v] and b[v]: fp32 [V, r, K] and [V, N, r]."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float):
        self.a, self.b, self.scaling = a, b, scaling

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] % len(self.a):
            raise ValueError(f"x: {x.shape[0]} along dim 0; expected a multiple of the {len(self.a)} variants")
        parts = x.reshape(len(self.a), -1, x.shape[-1])
        inner = (parts @ self.a.to(x.dtype).mT) * self.scaling
        return (inner @ self.b.to(x.dtype).mT).view(*x.shape[:-1], -1)


class Lora:
    """Adapters of rank r on the QuantLinears of `layers` (names to layers) whose last name is in `modules`.

    They act as soon as they are made, and at first change nothing: `seed` makes A, B is 0. eps and lr: of the values of A and B.
    ValueError where no layer is chosen, or for another noise_bits than 2 to 8 or estimator than rge1 and rge2.
    """

    name = "lora"
    relative = False
    floor = float("-inf")

    def __init__(
        self, layers: dict[str, QuantLinear], seed: int, eps: float, lr: float, r: int = 8, alpha: float = 16.0,
        noise_bits: int = 4, estimator: str = "rge1", modules: Collection[str] = MODULES,
    ):  # fmt: skip
        chosen = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in modules}
        if not chosen or r < 1:
            raise ValueError(f"r = {r}, {len(chosen)} of {len(layers)} layers named {', '.join(modules)}; expected at least 1 of each")
        self.eps, self.lr, self.noise_bits, self.seed = eps, lr, noise_bits, seed
        self.unit, self.stream = quantized.unit(noise_bits, estimator), quantized.STREAMS[estimator]
        self._level = quantized.level(noise_bits)
        self._info = []
        for module, layer in chosen.items():
            for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
                name = tensor_name(f"{module}.{part}", self.name)
                self._info.append(TensorInfo(name, tensor_uid(name), shape, self.floor))
        check_unique(info.name for info in self._info)
        # One tensor holds them all: what is done to each element takes one launch.
        self._sizes = [-(-math.prod(info.shape) // _ALIGN) * _ALIGN for info in self._info]
        self._values = torch.zeros(sum(self._sizes), device=next(iter(chosen.values())).scales.device)
        self._parameters = [nn.Parameter(value[0], requires_grad=False) for value in self._views(self._values[None])]
        self.load_state({info.name: initial(info.name, info.shape, seed) for info in self._info})
        views = self._views(self._values[None])
        self._adapters = [_Adapter(a, b, alpha / r) for a, b in zip(views[0::2], views[1::2], strict=True)]
        for layer, adapter in zip(chosen.values(), self._adapters, strict=True):
            layer.adapter = adapter

    def _views(self, flat: Tensor) -> list[Tensor]:
        """flat [V, total] -> [V, rows, cols] of every tensor."""
        parts = zip(flat.split(self._sizes, 1), self._info, strict=True)
        return [part[:, : math.prod(info.shape)].unflatten(1, info.shape) for part, info in parts]

    def _show(self, flat: Tensor) -> None:
        views = self._views(flat)
        for adapter, a, b in zip(self._adapters, views[0::2], views[1::2], strict=True):
            adapter.a, adapter.b = a, b

    def _draw(self, state: Tensor, stream: int, out: Tensor) -> None:
        """The noise of all tensors for state int64 [3], into int8 [total]."""
        for info, (part,) in zip(self._info, self._views(out[None]), strict=True):
            ops_noisy.code_noise(*info.shape, state, info.uid, self.noise_bits, stream, part)

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def info(self) -> list[TensorInfo]:
        return self._info

    @contextmanager
    def entered(self, variants: Variants) -> Iterator[None]:
        states = variants.states[::2] if variants.paired else variants.states
        u = self._values.new_zeros(len(states), len(self._values), dtype=torch.int8)
        for state, out in zip(states, u, strict=True):
            self._draw(state, 1, out)
        u = u.repeat_interleave(2, 0) if variants.paired else u
        sizes = variants.signs * (self.eps * self._level)
        self._show(self._values + sizes[:, None] * u.float())
        try:
            yield
        finally:
            self._show(self._values[None])

    def settings(self) -> dict[str, Any]:
        return {"noise_bits": self.noise_bits, "stream": self.stream, "seed": self.seed}

    def apply(self, state: Tensor, coefs: Tensor) -> None:
        _descend_(self._values, state, coefs, lambda at, out: self._draw(at, self.stream, out))

    def state(self) -> dict[str, Tensor]:
        return {info.name: value.data for info, value in zip(self._info, self._parameters, strict=True)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])

    def statistics(self, state: Tensor) -> dict[str, Any]:
        """Root mean squares of all A and of all B, and the noise of the first A."""
        size = {part: math.sqrt(torch.cat([v.flatten() for v in self._parameters[i::2]]).double().square().mean()) for i, part in enumerate("AB")}
        return {"rms": size, "noise": quantized.sampled(self._info[0], state, self.noise_bits)}

    def warning(self, coef: float, steps: int) -> str | None:
        return None
