"""Ranges of what goes through a site of smoothing (model/smoothing.py), and the scale that the exponent rule makes of them."""

import torch
from torch import Tensor


class Extent:
    """Smallest and largest value by entry."""

    def __init__(self, entries: int, device: torch.device):
        self.low, self.high = (torch.full((entries,), sign * float("inf"), device=device) for sign in (1, -1))

    def add(self, x: Tensor, index: Tensor | None) -> None:
        """x [..., C] of channels whose entries are index [C]."""
        low, high = x.float().reshape(-1, x.shape[-1]).aminmax(dim=0)
        at = torch.arange(len(low), device=low.device) if index is None else index
        self.low.scatter_reduce_(0, at, low, "amin")
        self.high.scatter_reduce_(0, at, high, "amax")

    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    def largest(self, shift: Tensor | None) -> Tensor:
        """max |x - shift|."""
        shift = 0.0 if shift is None else shift
        return torch.maximum((self.low - shift).abs(), (self.high - shift).abs())


class Ranges:
    """Of a site: its X in `inputs`; what it is multiplied by in `keys`, the weights of its readers, or k for q."""

    def __init__(self, entries: int, device: torch.device):
        self.inputs, self.keys = Extent(entries, device), Extent(entries, device)

    def scale(self, exponent: float, shift: Tensor | None) -> Tensor:
        """s = max|X - δ|^a / max|W|^(1 - a), its geometric mean 1."""
        logs = [extent.clamp(min=1e-5).log() for extent in (self.inputs.largest(shift), self.keys.largest(None))]
        log = exponent * logs[0] - (1 - exponent) * logs[1]
        return (log - log.mean()).exp()

