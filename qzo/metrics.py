"""metrics.jsonl: what a run shows for plots, one JSON object per line; the journal, not this file, is the run."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from qzo.disk import disk_error


@dataclass
class Counts:
    """Sums over the steps so far, as metrics.jsonl shows them."""

    examples: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


class Metrics:
    """Appends to metrics.jsonl. Each of `listeners` is called with a line once it is written."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(self._path, error) from error

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. NaN and infinities become null; `nonfinite` says what they were: {"scores.f1": "nan"}.

        Raises RunFailed where the disk is full, with the file cut back to its last whole line.
        """
        strange: dict[str, str] = {}
        plain = _plain(values, "", strange)
        if strange:
            plain["nonfinite"] = strange
        line = json.dumps(plain, allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n"
        whole, done = self._file.tell(), 0
        try:
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(whole)
            raise disk_error(self._path, error) from error
        for listener in self.listeners:
            listener(plain)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines, in order; none where there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def cut_back(path: str | Path, step: int) -> None:
    """Drop what `step` applied steps cannot have written (lines with step >= `step` or after > `step`), and torn lines.

    To be called before the file is opened to go on; does nothing where there is no file.
    """
    path = Path(path)
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        kept = b"".join(line + b"\n" for line in lines if not _from(line, step))
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error


def _plain(value: Any, name: str, strange: dict[str, str]) -> Any:
    """`value` for JSON; what is not finite goes into `strange` under its dotted name."""
    if isinstance(value, dict):
        return {key: _plain(item, f"{name}.{key}" if name else str(key), strange) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{i}", strange) for i, item in enumerate(value)]
    if isinstance(value, Real) and not isinstance(value, Integral):
        if not math.isfinite(value):
            strange[name] = str(float(value))
            return None
        return float(value)
    return value


def _from(line: bytes, step: int) -> bool:
    """Whether a line was written later than by the step before `step`, or is no JSON object."""
    try:
        values = json.loads(line)
        return not isinstance(values, dict) or values.get("step", values.get("after", 0) - 1) >= step
    except (ValueError, TypeError):
        return True
