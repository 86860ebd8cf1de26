"""Orders that are a pure function of (seed, epoch), from the bits of noise version 1."""

import heapq
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2s

import torch
from qzo_kernels.reference import philox

CHUNK = 1 << 18  # indices whose bits are made at once


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int, name: str) -> tuple[int, ...]:
    """range(n) sorted by (word 0, word 1, index) of Philox at counter (index, uid(name), epoch, 0). Frozen."""
    return tuple(index for *_, index in sorted(_keys(seed, epoch, 0, n, name)))


def beginning(seed: int, epoch: int, n: int, name: str, count: int) -> list[int]:
    """permutation(...)[:count], in memory for `count` and not for n."""
    found: list[tuple[int, int, int]] = []
    for start in range(0, n, CHUNK):
        found = heapq.nsmallest(count, [*found, *_keys(seed, epoch, start, min(start + CHUNK, n), name)])
    return [index for *_, index in found]


def subset(limit: int, n: int) -> Sequence[int]:
    """Which of n training examples a run with `limit` of them has: the same for every run and seed. Frozen."""
    return beginning(0, 0, n, "data/subset", limit) if limit < n else range(n)


def _keys(seed: int, epoch: int, start: int, stop: int, name: str) -> list[tuple[int, int, int]]:
    uid = int.from_bytes(blake2s(name.encode()).digest()[:4], "little")
    word0, word1, _, _ = philox(seed, torch.arange(start, stop), uid, epoch, 0)
    return list(zip(word0.tolist(), word1.tolist(), range(start, stop), strict=True))
