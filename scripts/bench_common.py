"""What the benchmarks share: where figures come from, the gate of green tests, timing by graph replay, tables."""

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.data.permutation import permutation
from qzo.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 20, 100, 0.4


class Red(Exception):
    """The kernel tests are not known to be green for this commit."""


def commit() -> str:
    """The commit that is measured: QZO_COMMIT where the tree is a copy without its history."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return os.environ.get("QZO_COMMIT") or run.stdout.strip()


def dev_split(recipe: Recipe, count: int, folder: Path) -> None:
    """The recipe's own training examples as train.jsonl, the next `count` of the same order as the evaluation split."""
    lines = (Path(recipe.data) / f"{recipe.train_split}.jsonl").read_text("utf-8").splitlines()
    order = permutation(0, 0, len(lines), "data/subset")
    parts = {recipe.train_split: order[: recipe.train_examples], recipe.eval_split: order[recipe.train_examples :][:count]}
    for split, indices in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(lines[i] + "\n" for i in indices), "utf-8")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def slug(name: str) -> str:
    """`NVIDIA H200` -> `h200`, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia").strip()).strip("-")


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 14


def about(device: torch.device) -> dict[str, Any]:
    """Commit, device, versions and command of a run."""
    found = {"commit": commit(), "command": " ".join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
             "device": device_name(device), "l2_bytes": l2_bytes(device)}  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers"):
        versions[name] = version(name)
    return found | {"versions": versions}


def check_log(text: str, expected_commit: str, device: str | None) -> int:
    """The number of tests that passed, from what pytest printed. Raises Red unless it is a green run of this commit's kernel tests.

    `device`: the GPU that the log must name, None if any will do.
    """
    for needed in (expected_commit, "tests/kernels", device):
        if needed is not None and (not needed or needed not in text):
            raise Red(f"the log does not name {needed or 'a commit'}")
    bad = re.findall(r"\b\d+ (?:failed|errors?)\b", text)
    passed = re.findall(r"\b(\d+) passed\b", text)
    if bad or not passed:
        raise Red(", ".join(bad) or "no test passed")
    return int(passed[-1])


def green_tests(log: str | None, device: torch.device) -> dict[str, Any]:
    """What is known of the kernel tests, from a pytest log or by running them. Exits with code 1 when they are red."""
    try:
        if log:
            text = Path(log).read_text("utf-8")
            return {"log": Path(log).name, "passed": check_log(text, commit(), device_name(device) if device.type == "cuda" else None)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        print(run.stdout[-2000:], file=sys.stderr, flush=True)
        if run.returncode:
            raise Red(f"pytest tests/kernels ended with code {run.returncode}")
        return {"command": "pytest tests/kernels", "passed": int(re.findall(r"(\d+) passed", run.stdout)[-1])}
    except (Red, OSError) as error:
        print(f"kernel tests: {error}. Nothing is measured until they are green.", file=sys.stderr)
        raise SystemExit(1) from error


@dataclass(frozen=True)
class Sample:
    """Median and 20/80 percentiles of `n` measurements, in seconds."""

    median: float
    p20: float
    p80: float
    n: int


def sample(seconds: Sequence[float]) -> Sample:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Sample(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


class Stopwatch:
    """Seconds between `start` and `stop`: device events on CUDA, read after a synchronization."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """The time between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


class Captured:
    """Calls in one CUDA graph (elsewhere: run one after another); the results of the first and the last are kept."""

    def __init__(self, calls: Sequence[Callable[[], Tensor | None]], device: torch.device):
        self.calls, self.graph = list(calls), None
        self.kept: list[Tensor] = []
        for call in self.calls[:2]:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        self.kept = []
        for i, call in enumerate(self.calls):
            result = call()
            if result is not None and i in (0, len(self.calls) - 1):
                self.kept.append(result)

    def replay(self) -> None:
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def first(self) -> Tensor:
        """The result of the first call in a replay that begins with poisoned results."""
        for result in self.kept:
            result.fill_(float("nan") if result.is_floating_point() else -(1 << 6))
        self.replay()
        return self.kept[0]


def in_turn(captured: Sequence[Captured], device: torch.device, least: int = LEAST_ROUNDS) -> list[Sample]:
    """Time per call of each, replayed in turn, at least `least` rounds: whatever the clock does, it does to all of them."""
    for one in captured:
        one.replay()
    watch = Stopwatch(device)
    watch.mark()
    for one in captured:
        one.replay()
    watch.mark()
    rounds = max(least, min(MOST_ROUNDS, int(ROUNDS_SECONDS / max(watch.laps()[0], 1e-9))))
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(rounds):
        for one in captured:
            one.replay()
            watch.mark()
    laps = watch.laps()
    return [sample([lap / len(one.calls) for lap in laps[i :: len(captured)]]) for i, one in enumerate(captured)]


def reason(error: BaseException) -> str:
    """One line of an error, for the table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text, numbers with four digits."""
    cells = [list(columns)] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_text(row.get(column)) for column in columns] for row in rows)


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, default=asdict) + "\n", "utf-8")
