"""What a command takes of the device and of the host's memory, watched from outside."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.1  # seconds between two looks


def device_used() -> float:
    """GB that all processes have of the first GPU, their contexts included; 0 where there is none."""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
        return float(asked.stdout.split()[0]) * (1 << 20) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def host_used(pid: int) -> float:
    """GB of a process that no file backs (RssAnon)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon:")), 0.0)


def watch(command: Sequence[str], enough: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run `command`, alone on its GPU, to its end, or kill -9 it when `enough()`.

    {exit, seconds, device_gb, host_gb: the most of each; printed, said: its last lines}
    """
    before, began = device_used(), time.monotonic()
    device = host = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            device, host = max(device, device_used() - before), max(host, host_used(process.pid))
            if enough():
                process.kill()
                break
            time.sleep(PAUSE)
        out, said = (text.strip().splitlines() or [""] for text in process.communicate())
    return {
        "exit": process.returncode, "seconds": time.monotonic() - began, "device_gb": device, "host_gb": host,
        "printed": out[-1], "said": said[-1],
    }  # fmt: skip
