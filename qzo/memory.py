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


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
