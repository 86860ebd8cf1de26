"""Orders that are a pure function of (seed, epoch), from the bits of noise version 1."""

from functools import lru_cache
from hashlib import blake2s

import torch
from qzo_kernels.reference import philox


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int, name: str) -> tuple[int, ...]:
    """range(n) sorted by (word 0, word 1, index) of Philox at counter (index, uid(name), epoch, 0). Frozen."""
    uid = int.from_bytes(blake2s(name.encode()).digest()[:4], "little")
    word0, word1, _, _ = philox(seed, torch.arange(n), uid, epoch, 0)
    keys = list(zip(word0.tolist(), word1.tolist(), range(n), strict=True))
    return tuple(sorted(range(n), key=keys.__getitem__))
