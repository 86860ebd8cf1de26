"""The lines of metrics.jsonl, shown by another tool: TensorBoard, Weights & Biases, trackio or MLflow.

A thread hands them over, so that no step waits for a tool. A tool that fails costs one warning and is left alone until the run goes
on; it then gets what it lacks. tracker.json in the run's folder says, by tool, which of the tool's runs is ours and how far it has
come: it is written before the points are, so that a run that was killed shows none twice.
"""

import json
import os
import queue
import sys
import threading
import time
import uuid
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from qzo.errors import BadInput
from qzo.metrics import read_metrics

EXTRAS = ("tensorboard", "wandb", "trackio", "mlflow")  # a module and an extra of qzo have one name
PROJECT = "qzo"
GATHER = 0.5  # seconds of points in one call of a tool
PATIENCE = 60.0  # seconds that the end of a run waits for a tool

Point = tuple[int, dict[str, float]]


class Tool(Protocol):
    """What is asked of a tool. Any of it may raise."""

    def start(self, name: str, settings: dict[str, Any], folder: Path, known: str | None) -> str:
        """Begin the tool's run, or go on with the one that is `known`; returns by what it will be known."""

    def log(self, points: list[Point]) -> None:
        """Show the values of steps, in order."""

    def close(self, finished: bool) -> None:
        """`finished`: the run came to its end; it was stopped otherwise."""


class TensorBoard:
    """Event files in tensorboard/ of the run's folder, so that `tensorboard --logdir runs` shows all runs."""

    def start(self, name: str, settings: dict[str, Any], folder: Path, known: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        if not known:
            self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
        return "tensorboard"

    def log(self, points: list[Point]) -> None:
        for step, values in points:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project in WANDB_PROJECT (qzo); its own environment variables hold, WANDB_MODE=offline among them."""

    def start(self, name: str, settings: dict[str, Any], folder: Path, known: str | None) -> str:
        import wandb

        # It would ask for a key on the terminal.
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in; `wandb login`, or WANDB_MODE=offline")
        known = known or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, id=known, resume="allow", config=settings, dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        return known

    def log(self, points: list[Point]) -> None:
        for step, values in points:
            self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """A run of the project qzo, in trackio's own folder or the Space that TRACKIO_SPACE_ID names."""

    def start(self, name: str, settings: dict[str, Any], folder: Path, known: str | None) -> str:
        import trackio

        # stdout is for the run's result. Redirected, it would be so for all threads, and for good where a call hangs.
        for module in [module for at, module in sys.modules.items() if at.partition(".")[0] == "trackio"]:
            module.print = partial(print, file=sys.stderr)
        known = known or f"{name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(PROJECT, known, config=settings, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        return known

    def log(self, points: list[Point]) -> None:
        for step, values in points:
            self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment in MLFLOW_EXPERIMENT_NAME (qzo), where MLFLOW_TRACKING_URI says."""

    def start(self, name: str, settings: dict[str, Any], folder: Path, known: str | None) -> str:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        if known:
            self._client.update_run(known, status="RUNNING")
        else:
            title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(title)
            number = experiment.experiment_id if experiment else self._client.create_experiment(title)
            known = self._client.create_run(number, run_name=name).info.run_id
            self._client.log_batch(known, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
        self._known = known
        return known

    def log(self, points: list[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for step, values in points for key, value in values.items()]
        for start in range(0, len(metrics), 1000):  # as many as a server takes
            self._client.log_batch(self._known, metrics=metrics[start : start + 1000])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._known, "FINISHED" if finished else "KILLED")


TOOLS: dict[str, type[Tool]] = dict(zip(EXTRAS, (TensorBoard, WeightsAndBiases, Trackio, MLflow), strict=True))


def check_tracker(kind: str) -> None:
    """Raises BadInput for a tool that is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise BadInput("track", kind, f"the package {kind}, which is not installed", f"pip install 'qzo[{kind}]', or track=none.")


def point(line: dict[str, Any]) -> Point:
    """A line of metrics.jsonl as a tool takes it: finite numbers by name; an evaluation's are evaluation/NAME, at the step it precedes."""
    values = {**line, **{f"evaluation/{key}": value for key, value in line.get("evaluation", {}).items()}}
    step = values.pop("step", None)
    step = values.pop("after", None) if step is None else step
    return step, {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


class Tracker:
    """Context of a run: what it is called with goes to the tool, if there is one."""

    def __init__(self, kind: str, folder: Path, name: str, settings: dict[str, Any]):
        self._kind, self._folder, self._name, self._settings = kind, folder, name, settings
        self._file, self._left = folder / "tracker.json", False
        self._lines: queue.SimpleQueue[dict[str, Any] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def start(self, metrics: str | Path) -> Self:
        """Begin with what is in metrics.jsonl already and the tool does not have."""
        if self._kind != "none":
            for line in read_metrics(metrics):
                self._lines.put(line)
            self._thread.start()
        return self

    def __call__(self, line: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._lines.put(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread.is_alive():
            self._lines.put(kind is None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._warn(f"not done after {PATIENCE:.0f} s")

    def _warn(self, reason: str) -> None:
        if self._left:
            return
        self._left = True
        line = "\n" if sys.stderr.isatty() else ""  # there, one line is rewritten
        print(f"{line}warning: {self._kind}: {reason.strip().partition(chr(10))[0]}; the run does without it, and the same command "
              "sends it what is missing", file=sys.stderr)  # fmt: skip

    def _work(self) -> None:
        try:
            self._hand_over(TOOLS[self._kind]())
        except (Exception, SystemExit) as error:
            self._warn(str(error) or type(error).__name__)

    def _hand_over(self, tool: Tool) -> None:
        marks = json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}
        mark = marks.setdefault(self._kind, {"id": None, "step": 0, "after": 0})
        mark["id"] = tool.start(self._name, self._settings, self._folder, mark["id"])
        self._write(marks)
        finished: bool | None = None
        while finished is None:
            gathered = [self._lines.get()]
            if gathered[0] not in (True, False):
                time.sleep(GATHER)
            while not self._lines.empty():
                gathered.append(self._lines.get())
            if isinstance(gathered[-1], bool):
                finished = gathered.pop()
            before, points = dict(mark), []
            for line in gathered:
                key = "step" if "step" in line else "after"
                if line[key] >= mark[key]:
                    points.append(point(line))
                    mark[key] = line[key] + 1
            if points:
                self._write(marks)
                try:
                    tool.log(points)
                except BaseException:
                    mark.update(before)
                    self._write(marks)
                    raise
        tool.close(finished)

    def _write(self, marks: dict[str, Any]) -> None:
        new = self._file.with_name("tracker.json.tmp")
        new.write_text(json.dumps(marks, indent=1), encoding="utf-8")
        new.replace(self._file)
