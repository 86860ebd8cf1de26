"""Which noise a forward sees: tensor uids and variants (direction, sign). The bits come from qzo_kernels (noise version 1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2s

import torch

NOISE_VERSION = 1
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")


def tensor_name(module: str, target: str) -> str:
    """`<module name in the checkpoint>/<target>`, without the prefixes that wrappers add."""
    while True:
        for prefix in _WRAPPERS:
            if module.startswith(prefix):
                module = module[len(prefix) :]
                break
        else:
            return f"{module}/{target}"


def tensor_uid(name: str) -> int:
    """The 32-bit id that selects a tensor's noise."""
    return int.from_bytes(blake2s(name.encode()).digest()[:4], "little")


def check_unique(names: Iterable[str]) -> None:
    """Raises ValueError when two tensors would get the same noise."""
    seen: dict[int, str] = {}
    for name in names:
        other = seen.setdefault(tensor_uid(name), name)
        if other != name:
            raise ValueError(f"tensors {other!r} and {name!r} share the noise uid {tensor_uid(name)}; rename one module")


@dataclass(frozen=True)
class Variants:
    """V perturbations of all targets: states int64 [V, 3], rows (seed, step, direction); signs fp32 [V] in {+1, 0, -1}.

    paired: variants 2i and 2i + 1 are of one direction.
    """

    states: torch.Tensor
    signs: torch.Tensor
    paired: bool = False


def variants(seed: int, step: int, pairs: Sequence[tuple[int, int]], device: torch.device) -> Variants:
    """Variants for (direction, sign) pairs of one step, on `device`."""
    states = torch.tensor([[seed, step, direction] for direction, _ in pairs], dtype=torch.int64)
    signs = torch.tensor([sign for _, sign in pairs], dtype=torch.float32)
    directions = [direction for direction, _ in pairs]
    return Variants(states.to(device), signs.to(device), directions[::2] == directions[1::2])
