"""A run beside its tracker: each point once, whatever happens to either of them. Real tools where they are installed."""

import json
import os
import signal
import sys
import threading

import pytest
from children import Child

from qzo.cli import main
from qzo.metrics import read_metrics
from qzo.track import EXTRAS, TOOLS, Tracker, point
from qzo.tune import Tuner

NOTE = """
import json, os, time
def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
"""
# The few functions that qzo calls, as the tools have them.
FAKES = {
    "wandb": {"__init__": NOTE + """
def login(prompt):
    return "KEY" in os.environ
Settings = dict
class Run:
    def log(self, values, step):
        note("log", step, values)
    def finish(self, exit_code):
        note("close", exit_code == 0)
def init(project, name, id, resume, config, dir, settings):
    assert resume == "allow" and config["lr"] == 0.01 and settings["console"] == "off"
    note("start", id)
    return Run()
"""},
    "trackio": {"__init__": NOTE + """
class Run:
    def log(self, values, step):
        note("log", step, values)
    def finish(self):
        note("close", True)
def init(project, name, config, resume, embed, auto_log_gpu, auto_log_cpu):
    assert resume == "allow" and config["lr"] == 0.01
    print("* Created new run")
    note("start", name)
    return Run()
"""},
    "mlflow": {"__init__": NOTE, "entities": """
def Metric(key, value, timestamp, step):
    return step, {key: value}
def Param(key, value):
    return key, value
""", "tracking": """
from types import SimpleNamespace as Named
from mlflow import note
class MlflowClient:
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        return "1"
    def create_run(self, experiment, run_name):
        note("start", "abc")
        return Named(info=Named(run_id="abc"))
    def update_run(self, run, status):
        note("start", run)
    def log_batch(self, run, metrics=(), params=()):
        assert run == "abc" and len(metrics) <= 1000 and (metrics or dict(params)["lr"] == "0.01")
        for step, values in metrics:
            note("log", step, values)
    def set_terminated(self, run, status):
        note("close", status == "FINISHED")
"""},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr("qzo.track.GATHER", 0.01)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Puts the fake of a tool in its place; what it was told, as a list."""
    notes = tmp_path / "notes"
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("KEY", "1")

    def put(kind):
        for file, text in FAKES[kind].items():
            path = tmp_path / "site" / kind / f"{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == kind]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] in FAKES]:
        del sys.modules[name]


def stop_at(monkeypatch, step):
    """Ctrl-C while that many steps are done."""
    real = Tuner.launch

    def launch(self):
        real(self)
        if self.optimizer.steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Tuner, "launch", launch)


def points(notes, key):
    return [step for what, step, *values in notes if what == "log" and key in values[0]]


def test_points_of_lines():
    assert point({"step": 3, "loss": None, "lr": 1, "clipped": True, "nonfinite": {"loss": "nan"}}) == (3, {"lr": 1.0, "clipped": 1.0})
    line = {"after": 6, "evaluation": {"accuracy": 0.5, "loss": None}, "peak_memory": 7}
    assert point(line) == (6, {"evaluation/accuracy": 0.5, "peak_memory": 7.0})


@pytest.mark.parametrize("kind", FAKES)
def test_a_run_that_goes_on(kind, fake, recipe, tmp_path, monkeypatch, capsys):
    """Stopped after three steps and continued: the same run of the tool, each point once, with what metrics.jsonl says."""
    notes = fake(kind)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["tune", recipe, f"track={kind}"]) == 130
    assert points(notes(), "loss") == [0, 1, 2]
    assert notes()[-1] == ["close", kind == "trackio"]
    assert main(["tune", recipe, f"track={kind}"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path}/run/report.md") and "warning" not in err
    assert points(notes(), "loss") == points(notes(), "lr") == list(range(6)) and points(notes(), "evaluation/loss") == [0, 6]
    first, second = (told[1] for told in notes() if told[0] == "start")
    assert first == second and notes()[-1] == ["close", True]
    logged = {step: values[0]["loss"] for what, step, *values in notes() if what == "log" and "loss" in values[0]}
    assert logged == {m["step"]: m["loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "step" in m}


def test_a_tool_that_comes_later(fake, recipe, tmp_path):
    """`track` may be changed in a run: the tool gets the steps before as well, and a finished run again nothing."""
    notes = fake("trackio")
    assert main(["tune", recipe]) == 0 and not (tmp_path / "run" / "tracker.json").exists()
    for _ in range(2):
        assert main(["tune", recipe, "track=trackio"]) == 0
        assert points(notes(), "loss") == list(range(6)) and points(notes(), "evaluation/loss") == [0, 6]


@pytest.mark.parametrize("moment", [("log", 1, False), ("log", 1, True), ("_write", 2, True), ("start", 1, False)], ids=str)
def test_a_run_that_was_killed(moment, fake, recipe, tmp_path, monkeypatch):
    """No point twice; lost are only those that were just being handed over."""
    name, call, after = moment
    notes = fake("trackio")

    def kill():
        where = Tracker if name == "_write" else TOOLS["trackio"]
        real, calls = getattr(where, name), []

        def killed(self, *args):
            calls.append(args)
            if len(calls) == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(self, *args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(where, name, killed)

    code, text = Child("tune", recipe, "track=trackio", before=kill).wait()
    assert code == -signal.SIGKILL, text
    assert main(["tune", recipe, "track=trackio"]) == 0
    for key, all_of_them in (("loss", list(range(6))), ("evaluation/loss", [0, 6])):
        told = points(notes(), key)
        assert told == sorted(set(told)) and set(told) <= set(all_of_them)
        assert told == all_of_them or name != "start"


def failing(name, wake):
    """trackio, whose first call of that name fails; or hangs until `wake` is set, and then fails."""
    class Tool(TOOLS["trackio"]):
        calls = 0

    def fail(self, *args):
        Tool.calls += 1
        if Tool.calls == 1:
            if wake:
                wake.wait()
            raise OSError("no route to host\nmore of it")
        return getattr(TOOLS["trackio"], name)(self, *args)

    setattr(Tool, name, fail)
    return Tool


@pytest.mark.parametrize("case", [("start",), ("log",), ("close",), ("start", "hangs"), ("log", "hangs")], ids=str)
def test_a_tool_that_fails(case, fake, recipe, tmp_path, monkeypatch, capsys):
    """One warning, the same run, and the next command sends what is missing."""
    notes, wake = fake("trackio"), threading.Event() if len(case) == 2 else None
    with monkeypatch.context() as patch:
        patch.setitem(TOOLS, "trackio", failing(case[0], wake))
        patch.setattr("qzo.track.PATIENCE", 0.3)
        assert main(["tune", recipe, "track=trackio"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path}/run/report.md") and (tmp_path / "run" / "report.html").exists()
    reason = "not done after 0 s" if wake else "no route to host"
    assert err.count("warning") == 1 and f"warning: trackio: {reason}; the run does without it" in err and "Traceback" not in err
    assert "more of it" not in err
    if wake:
        wake.set()
        for thread in [thread for thread in threading.enumerate() if thread.name == "tracker"]:
            thread.join()
        assert capsys.readouterr().err == ""
    else:
        assert main(["tune", recipe, "track=trackio"]) == 0
        assert points(notes(), "loss") == list(range(6)) and points(notes(), "evaluation/loss") == [0, 6]


def test_wandb_asks_nothing(fake, recipe, monkeypatch, capsys):
    notes = fake("wandb")
    monkeypatch.delenv("KEY")
    assert main(["tune", recipe, "track=wandb"]) == 0
    assert "warning: wandb: not logged in; `wandb login`, or WANDB_MODE=offline; the run" in capsys.readouterr().err and not notes()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["tune", recipe, "track=wandb"]) == 0
    assert points(notes(), "loss") == list(range(6))


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_tool_that_is_not_installed(kind, more, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qzo.track.find_spec", lambda name: None)
    assert main(["tune", recipe, f"track={kind}", *more]) == 2
    assert capsys.readouterr().err == (
        f"qzo tune: track: {kind}; expected the package {kind}, which is not installed. pip install 'qzo[{kind}]', or track=none.\n"
    )
    assert not (tmp_path / "run").exists()


def test_every_tool_is_an_extra_and_a_choice():
    import tomllib
    from pathlib import Path
    from typing import get_args

    from qzo.recipe import Recipe

    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) <= set(extras) and get_args(Recipe.model_fields["track"].annotation) == ("none", *EXTRAS)


def in_two_parts(recipe, kind, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["tune", recipe, f"track={kind}"]) == 130
    assert main(["tune", recipe, f"track={kind}"]) == 0
    out, err = capsys.readouterr()
    assert "warning: " + kind not in err and "report.md" in out.splitlines()[0], err


def test_tensorboard_for_real(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_two_parts(recipe, "tensorboard", monkeypatch, capsys)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    losses = [m["loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "step" in m]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(i, pytest.approx(loss)) for i, loss in enumerate(losses)]
    assert [e.step for e in read.Scalars("evaluation/accuracy")] == [0, 6]
    assert read.Tags()["tensors"] == ["settings/text_summary"]


@pytest.mark.campaign
def test_mlflow_for_real(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    in_two_parts(recipe, "mlflow", monkeypatch, capsys)
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("qzo").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(6))
    assert [m.step for m in client.get_metric_history(run.info.run_id, "evaluation/loss")] == [0, 6]
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.01" and run.info.run_name == "recipe-seed0"


@pytest.mark.campaign
def test_trackio_for_real(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    in_two_parts(recipe, "trackio", monkeypatch, capsys)
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("qzo")
    logs = SQLiteStorage.get_logs("qzo", name)
    assert sorted(log["step"] for log in logs if "loss" in log) == list(range(6))
    assert sorted(log["step"] for log in logs if "evaluation/loss" in log) == [0, 6]


@pytest.mark.campaign
def test_wandb_offline_for_real(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    in_two_parts(recipe, "wandb", monkeypatch, capsys)
    mark = json.loads((tmp_path / "run" / "tracker.json").read_text())["wandb"]
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(mark["id"]) for folder in folders)
    assert (mark["step"], mark["after"]) == (6, 7) and all(list(folder.glob("*.wandb")) for folder in folders)
