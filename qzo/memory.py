"""Memory in use, in bytes: what the process holds itself (mapped weight files not counted) and its peak on the device."""

from pathlib import Path

import torch


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def host_anonymous() -> int:
    """RssAnon: resident memory that no file backs."""
    return _status("RssAnon")


def peak(device: torch.device) -> int:
    """The most that was ever reserved on a GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _status("VmHWM")


def available(device: torch.device, limit: float | None = None) -> int | None:
    """Bytes that this process may still take of a GPU, of `limit` GB at most; None on a CPU, whose memory swaps."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    return free if limit is None else min(free, int(limit * 1e9))


def restrict(device: torch.device, limit: float | None) -> None:
    """Let PyTorch take at most `limit` GB of the current GPU from now on."""
    if device.type == "cuda" and limit is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
