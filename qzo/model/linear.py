"""QuantLinear: packed codes, fp32 scales, and a forward that never stores the weight."""

from collections.abc import Callable

import torch
from qzo_kernels import ops, ops_a8, ops_asym, ops_noisy, ops_vectors
from torch import nn

from qzo.model.uniform import InputGrid, LayerTensors


class Scratch:
    """One buffer for the dequantized weight of whichever layer is running: as large as the largest layer.

    It is made once, at the first need, so that its address may be captured in a graph.
    """

    def __init__(self) -> None:
        self._elements = 0
        self._buffer: torch.Tensor | None = None

    def reserve(self, elements: int) -> None:
        """A layer of so many weights will use it."""
        self._elements = max(self._elements, elements)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """uint8, on x's device, in which every layer's weight fits in x's dtype."""
        size = self._elements * x.dtype.itemsize
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != x.device:
            self._buffer = None
            self._buffer = torch.empty(size, dtype=torch.uint8, device=x.device)
        return self._buffer


class QuantLinear(nn.Module):
    """y = x·Wᵀ + bias with W[n, k] = scales[n, k // group_size]·(code - zero), or ·codebook[code], W never stored: see LayerTensors.

    scales is a Parameter without gradient, fp32 [N, G]. With `noise` set, x [V·B, ..., K] is cut into V equal parts
    along dim 0, and part v is multiplied with the weight under variant v of the noise, on the scales or on the codes.
    `activations` "int8" or "fp8": x is rounded to 8 bits per row, and the product is of integers. `adapter`: a function of x (in
    the model's order of channels) whose values are added.
    With an input grid (LayerTensors) x is shifted, divided and rounded as that says, and `activations` are None.
    Where `codes` stay on the host, `source` gives them on the device of the scales (model/stream.py).
    """

    def __init__(
        self, name: str, tensors: LayerTensors, bits: int, group_size: int, cols: int,
        bias: torch.Tensor | None = None, scratch: Scratch | None = None,
    ):  # fmt: skip
        super().__init__()
        self.name, self.bits, self.group_size = name, bits, group_size
        self.in_features, self.out_features = cols, tensors.scales.shape[0]
        self.register_buffer("codes", tensors.codes)
        self.register_buffer("zeros", tensors.zeros)
        self.register_buffer("perm", tensors.perm)
        self.register_buffer("codebook", tensors.codebook)
        grid = tensors.grid or InputGrid(16)
        self.input_bits, sums = grid.bits, None
        if grid.bits < 16:
            sums = ops_asym.code_sums(tensors.codes.to(tensors.scales.device), tensors.zeros, bits, group_size, cols)
        self.register_buffer("sums", sums)  # of which the point about which rows are rounded takes its share
        for key in ("span", "shift", "divisor"):
            self.register_buffer(key, getattr(grid, key))
        self.vectors = tensors.codebook is not None and tensors.codebook.dim() == 3
        self.scales = nn.Parameter(tensors.scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scratch = scratch or Scratch()
        self.scratch.reserve(self.out_features * self.in_features)
        self.noise: ops.Noise | ops_noisy.CodeNoise | None = None
        self.activations: str | None = None
        self.adapter: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.source: Callable[[], torch.Tensor] | None = None

    def _codes(self) -> torch.Tensor:
        return self.codes if self.source is None else self.source()

    def weight(self, dtype: torch.dtype, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [N, K] under `scales` (by default the stored ones), its columns in the order of the model's channels."""
        scales = self.scales if scales is None else scales
        if self.vectors:
            return (ops_vectors.vector_dequantize(self._codes(), self.codebook, self.in_features, torch.float32) * scales).to(dtype)
        shape = (self.bits, self.group_size, self.in_features)
        weight = ops.dequantize(self._codes(), scales, self.zeros, *shape, dtype, codebook=self.codebook)
        return weight if self.perm is None else weight[:, torch.argsort(self.perm)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x if self.shift is None else ((x - self.shift) / self.divisor).to(x.dtype)
        y = self._product(seen if self.perm is None else seen.index_select(-1, self.perm))
        return y if self.adapter is None else y + self.adapter(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_bits < 16:
            return self._low_bit(x)
        weight = (self._codes(), self.scales, self.zeros, self.bits, self.group_size)
        if self.codebook is not None and (self.activations or isinstance(self.noise, ops_noisy.CodeNoise)):
            raise ValueError(f"{self.name}: codes of a codebook with 8-bit activations or noise on codes; expected noise on the scales")
        if self.vectors:
            return ops_vectors.vector_matmul(x, self._codes(), self.codebook, self.scales, self.bias, self.noise, self.scratch.like(x))
        if isinstance(self.noise, ops_noisy.CodeNoise):
            return ops_noisy.noisy_matmul(x, *weight, self.bias, self.noise, self.activations, self.scratch.like(x))
        if self.activations:
            packed = ops_a8.takes_packed(self.bits, self.group_size, self.in_features)
            return ops_a8.quant_matmul_a8(x, *weight, self.activations, self.bias, self.noise, None if packed else self.scratch.like(x))
        route = ops.route_of(x.flatten(0, -2), self.bits, self.group_size, self.noise, self.codebook)
        scratch = self.scratch.like(x) if route == "dequantize" else None
        return ops.quant_matmul(x, *weight, self.bias, self.noise, scratch, route, self.codebook)

    def _low_bit(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations or isinstance(self.noise, ops_noisy.CodeNoise):
            raise ValueError(f"{self.name}: a grid of its own for inputs with 8-bit activations or noise on codes; expected noise on the scales")
        scratch = None if ops_a8.takes_packed(self.bits, self.group_size, self.in_features) else self.scratch.like(x)
        weight = (self._codes(), self.scales, self.zeros, self.sums, self.bits, self.group_size)
        return ops_asym.quant_matmul_asym(x, *weight, self.input_bits, self.span, self.bias, self.noise, scratch)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"
