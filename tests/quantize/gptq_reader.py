"""A reader of GPTQ files that shares no code with the package: bit by bit, in Python's integers."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Words int32 [W, C] that hold a bit stream down each column -> its first `count` fields, int64 [count, C]."""
    stream = np.unpackbits(words.astype("<i4").T.copy().view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(stream), count, bits).astype(np.int64).dot(1 << np.arange(bits)).T


def weights(folder: Path, bits: int, v2: bool) -> dict[str, torch.Tensor]:
    """Name of each quantized Linear -> its weight fp32 [N, K], of a checkpoint without a zero of 0 in version 1."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    found = {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        g_idx = tensors[f"{name}.g_idx"].long()
        scales = tensors[f"{name}.scales"]
        assert scales.dtype == torch.float16 and tensors[f"{name}.g_idx"].dtype == torch.int32
        codes = torch.from_numpy(fields(tensors[f"{name}.qweight"].numpy(), bits, len(g_idx)))
        zeros = torch.from_numpy(fields(tensors[f"{name}.qzeros"].numpy().T, bits, scales.shape[1]).T.copy())
        zeros = zeros if v2 else zeros + 1
        assert v2 or int(zeros.max()) < 2**bits, "a zero point of 0 in version 1"
        found[name] = ((codes - zeros[g_idx]).float() * scales.float()[g_idx]).t()
    return found
