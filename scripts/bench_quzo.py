"""QuZO (arXiv 2502.12346) in eager PyTorch, written from its equations: what fused kernels are compared with, for measurement only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLIP = 4.0  # standard deviations at the last level of the noise


class FakeQuantLinear(nn.Module):
    """A W8A8 linear by simulation: int8 codes and a scale per row; rows of x rounded to 8 bits; the product in x's dtype.

    `noise`, if set, gives v f32 [N, K] for one forward at a time; the weight seen is scale (q + v), a new tensor.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.data.float()
        self.scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_(min=1e-12)
        self.codes = (weight / self.scales).round().to(torch.int8)
        self.bias, self.noise = linear.bias, None

    def forward(self, x: Tensor) -> Tensor:
        q = self.codes.float() if self.noise is None else self.codes + self.noise()
        size = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / 127
        x8 = ((x / size).round() * size).to(x.dtype)
        return nn.functional.linear(x8, (q * self.scales).to(x.dtype), self.bias)


class EagerQuZO:
    """One query per step, on the codes of all linears but the head, which it replaces in `model`:

        u1 = Q1(z), u2 = Q2(z),   v = 4 u / L,   L = 2^(noise_bits - 1) - 1,   Q(z) = clamp(floor(z L / 4 + rand), -L, L)
        mu = [l(q + eps v1) - l(q - eps v1)] / 2 eps,     q <- clamp(q - floor(lr mu v2 + rand), -128, 127)

    z from torch.randn and the two roundings from torch.rand, each from a seed of its own and drawn again wherever needed, so that
    nothing of a weight's size is kept. eps and lr mu in grid steps. `noise_dtype` bfloat16 draws faster, but rounds with 8 bits.
    """

    def __init__(
        self, model: nn.Module, eps: float = 0.1, lr: float = 1e-4, noise_bits: int = 4, noise_dtype: torch.dtype = torch.float32
    ):
        self.eps, self.lr, self.top, self.noise_dtype = eps, lr, (1 << (noise_bits - 1)) - 1, noise_dtype
        self.layers: list[FakeQuantLinear] = []
        self.steps = 0
        for parent in list(model.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    layer = FakeQuantLinear(child)
                    setattr(parent, name, layer)
                    self.layers.append(layer)
        self.generator = torch.Generator(self.layers[0].codes.device)

    def _seeded(self, index: int, stream: int) -> torch.Generator:
        return self.generator.manual_seed((self.steps << 24) + (index << 2) + stream)

    def _rand(self, index: int, stream: int) -> Tensor:
        codes = self.layers[index].codes
        return torch.rand(codes.shape, generator=self._seeded(index, stream), device=codes.device, dtype=self.noise_dtype)

    def noise(self, index: int, stream: int) -> Tensor:
        """v of one layer: stream 1 as in the forwards, 2 as in the update."""
        codes = self.layers[index].codes
        z = torch.randn(codes.shape, generator=self._seeded(index, 0), device=codes.device, dtype=self.noise_dtype)
        u = torch.floor(z * (self.top / CLIP) + self._rand(index, stream)).clamp_(-self.top, self.top)
        return u.float() * (CLIP / self.top)

    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step; returns mu."""
        self.steps += 1
        losses = []
        for signed in (self.eps, -self.eps):
            for index, layer in enumerate(self.layers):
                layer.noise = lambda i=index, s=signed: s * self.noise(i, 1)
            losses.append(loss())
        for layer in self.layers:
            layer.noise = None
        mu = (losses[0] - losses[1]) / (2 * self.eps)
        for index, layer in enumerate(self.layers):
            move = torch.floor(self.lr * mu * self.noise(index, 2) + self._rand(index, 3))
            layer.codes = (layer.codes - move).clamp_(-128, 127).to(torch.int8)
        return mu.item()
