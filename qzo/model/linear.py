"""QuantLinear: packed codes, fp32 scales, and a forward that dequantizes into one scratch for a dense matmul."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from qzo_kernels import ops
from torch import nn

from qzo.model.gptq_format import LayerTensors


class Scratch:
    """One buffer for the dequantized weight of whichever layer is running: as large as the largest layer."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def view(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = None
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffer[:size].view(dtype).view(shape)


class QuantLinear(nn.Module):
    """y = x·Wᵀ + bias with W[n, k] = scales[n, k // group_size]·(code - zero), W never stored.

    scales is a Parameter without gradient, fp32 [N, G]. `effective_scales`, when set, returns the scales that this
    forward sees, one tensor per variant of the rows: x [V·B, ..., K] is cut into V equal parts along dim 0, and
    part v is multiplied with the weight of variant v.
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
        self.scales = nn.Parameter(tensors.scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scratch = scratch or Scratch()
        self.effective_scales: Callable[[], Sequence[torch.Tensor]] | None = None

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [N, K] under `scales` fp32 [N, G], its columns in the sorted order of `perm`."""
        return ops.dequantize(self.codes, scales, self.zeros, self.bits, self.group_size, self.in_features, dtype, out)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] under the stored scales, its columns in the order of the model's channels."""
        weight = self.dequantize(self.scales, dtype)
        if self.perm is None:
            return weight
        return weight[:, torch.argsort(self.perm)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variants = self.effective_scales() if self.effective_scales else (self.scales,)
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        shape = (self.out_features, self.in_features)
        parts = []
        for part, scales in zip(x.chunk(len(variants)), variants, strict=True):
            weight = self.dequantize(scales, x.dtype, self.scratch.view(shape, x.dtype, x.device))
            parts.append(F.linear(part, weight, self.bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"
