"""What moves. Every target has the contract `Target`; each is one file."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qzo.zo.noise import Variants


@dataclass(frozen=True)
class TensorInfo:
    """One 2-D tensor that moves: shape [rows, cols], `uid` of its noise, `floor` that its values never go below."""

    name: str
    uid: int
    shape: tuple[int, int]
    floor: float


@contextmanager
def layers_under_noise(layers: Iterable[Any], noises: Iterable[Any]) -> Iterator[None]:
    """Inside it each layer's `noise` is the one of its place; afterwards None."""
    layers = list(layers)
    for layer, noise in zip(layers, noises, strict=True):
        layer.noise = noise
    try:
        yield
    finally:
        for layer in layers:
            layer.noise = None


class Target(Protocol):
    """`eps` and `lr` are in the target's own units: absolute, relative to the value, or grid steps.

    unit: what a coefficient is multiplied by beside the rate, so that the recorded ones are those of `apply`.
    """

    name: str
    eps: float
    lr: float
    relative: bool
    unit: float

    def parameters(self) -> list[torch.Tensor]: ...

    def settings(self) -> dict[str, Any]:
        """What a replay needs to know beside the tensors, the seed and the coefficients, as JSON."""
        ...

    def info(self) -> list[TensorInfo]: ...

    def entered(self, variants: Variants) -> AbstractContextManager[None]:
        """Inside it a forward sees the effective weights of these variants; no stored tensor is written."""
        ...

    def apply(self, state: torch.Tensor, coefs: torch.Tensor) -> None:
        """w <- w - sum_i coefs[s, i] z_i for S steps in one pass. state int64 [2] = (seed, first step), coefs fp32 [S, D]."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resume needs, by tensor name."""
        ...

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def statistics(self, state: torch.Tensor) -> dict[str, Any]:
        """What is worth knowing of the tensors now and of the noise of state int64 [2] = (seed, step), as JSON; empty where nothing is."""
        ...

    def warning(self, coef: float, steps: int) -> str | None:
        """What is wrong with `steps` more steps whose coefficients are of size `coef`; None where nothing is."""
        ...
