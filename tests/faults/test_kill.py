"""A run that is killed, interrupted or damaged, and started again by the same command, ends in the same bytes."""

import os
import random
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
from children import Child, kill_at
from tiny_runs import write_recipe

import qzo.checkpoint
import qzo.journal
import qzo.tune
from qzo.checkpoint import newest_snapshot, state_hash
from qzo.cli import main
from qzo.journal import Journal, read_journal
from qzo.metrics import Metrics, read_metrics

KEYS = {"steps": 12, "save_every": 3, "eval_every": 5, "clip_median": 3.0, "warmup": 2}
RECORD = 24  # bytes, of one direction


def record_bytes(run: Path) -> bytes:
    """The journal without its header (which holds the run's own folder)."""
    data = (run / "journal.bin").read_bytes()
    return data[16 + struct.unpack_from("<I", data, 12)[0] + 4 :]


def outcome(run: Path) -> tuple:
    """All that has to come out the same, whatever happened on the way."""
    step, state, meta = newest_snapshot(run)
    final = run / "snapshots" / f"step-{step:06d}"
    lines = read_metrics(run / "metrics.jsonl")
    steps = [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")} for m in lines if "step" in m]
    assert [m["step"] for m in steps] == list(range(step)), "each step once"
    assert meta["state_sha256"] == state_hash(state)
    return (final / "state.safetensors").read_bytes(), meta["state_sha256"], record_bytes(run), steps


def evaluations(run: Path) -> list:
    return [(m["after"], m["evaluation"]) for m in read_metrics(run / "metrics.jsonl") if "evaluation" in m]


def records_in(run: Path) -> int:
    """Whole records so far of a run that is going on."""
    try:
        return len(record_bytes(run)) // RECORD
    except (OSError, struct.error):
        return -1


@pytest.fixture(scope="module")
def whole(llama4, sentiment, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    base = tmp_path_factory.mktemp("whole")
    assert main(["tune", write_recipe(base / "recipe.yaml", llama4, sentiment, **KEYS)]) == 0
    return base / "run"


@pytest.fixture
def recipe(llama4, sentiment, tmp_path) -> str:
    return write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **KEYS)


# What the process was doing when it was killed: the function, which call of it, before or after it.
MOMENTS = {
    "loading": (qzo.tune, "load_base", 1, True),
    "new journal": (qzo.journal.os, "rename", 1, False),
    "first evaluation": (qzo.tune, "evaluate_task", 1, False),
    "measuring a step": (qzo.tune, "per_example_loss", 9, False),
    "journaled and not logged": (Journal, "append", 5, True),
    "logged": (Metrics, "write", 7, True),
    "snapshot, before the rename": (qzo.checkpoint, "_fill", 2, True),
    "snapshot, old ones not removed": (qzo.checkpoint, "_discard", 4, False),
    "evaluation on the way": (qzo.tune, "evaluate_task", 2, False),
    "all steps done": (Journal, "append", 12, True),
    "last evaluation": (qzo.tune, "evaluate_task", 4, False),
    "report": (qzo.tune, "write_report", 1, False),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, recipe, whole, tmp_path):
    code, text = Child("tune", recipe, before=lambda: kill_at(*MOMENTS[moment])).wait()
    assert code == -signal.SIGKILL, text
    assert not (tmp_path / "run" / "report.md").exists()
    assert main(["tune", recipe]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)
    assert evaluations(tmp_path / "run") == evaluations(whole)
    assert (tmp_path / "run" / "report.md").exists() and not list((tmp_path / "run" / "snapshots").glob(".tmp*"))


def test_killed_again_and_again(recipe, whole, tmp_path):
    for call in (3, 2, 4):
        assert Child("tune", recipe, before=lambda call=call: kill_at(Journal, "append", call, True)).wait()[0] == -signal.SIGKILL
    assert len(read_journal(tmp_path / "run" / "journal.bin")[1]) == 9
    assert main(["tune", recipe]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def kill_in(phase: str, child: Child, run: Path, draw: random.Random, startup: float, tail: float) -> bool:
    """Kill the child at a random moment of a phase of its 200 steps; False when it came to its end before."""
    if phase == "start-up":
        time.sleep(draw.uniform(0, startup))
    else:
        step = {"steps": draw.randrange(1, 199), "snapshot": 5 * draw.randrange(1, 39), "end": 200}[phase]
        while records_in(run) < step and not child.ended():
            time.sleep(0.0005)
        while phase == "snapshot" and records_in(run) == step and not list((run / "snapshots").glob(".tmp*")):
            pass
        time.sleep(draw.uniform(0, {"steps": 0.1, "snapshot": 0.002, "end": tail}[phase]))
    child.send(signal.SIGKILL)
    return child.wait()[0] == -signal.SIGKILL


@pytest.mark.campaign
@pytest.mark.timeout(3000)
def test_killed_at_20_random_moments_of_200_steps(llama4, sentiment, tmp_path):
    keys = {**KEYS, "steps": 200, "save_every": 5, "eval_every": 50}
    whole = tmp_path / "whole"
    child = Child("tune", write_recipe(tmp_path / "whole.yaml", llama4, sentiment, output_dir=whole, **keys))
    times = [time.monotonic()]
    for count in (1, 200):
        while records_in(whole) < count:
            time.sleep(0.001)
        times.append(time.monotonic())
    assert child.wait()[0] == 0
    startup, tail, expected = times[1] - times[0], time.monotonic() - times[2], outcome(whole)
    draw, done = random.Random(0), []
    for number in range(60):
        run, phase = tmp_path / f"run{number}", ("start-up", "steps", "steps", "snapshot", "end")[len(done) % 5]
        path = write_recipe(tmp_path / f"{number}.yaml", llama4, sentiment, output_dir=run, **keys)
        killed = kill_in(phase, Child("tune", path), run, draw, startup, tail)
        at = records_in(run)
        code, text = Child("tune", path).wait()
        assert code == 0, text
        assert outcome(run) == expected
        assert evaluations(run) == evaluations(whole)
        if killed:
            done.append((phase, at))
            print(f"killed in {phase}, {at} records in the journal: the same bytes after all")
        if len(done) == 20:
            return
    pytest.fail(f"only {len(done)} of 60 were killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_writing_and_the_same_command_goes_on(number, recipe, whole, tmp_path):
    run, child = tmp_path / "run", Child("tune", recipe)
    while records_in(run) < 4:
        time.sleep(0.001)
    child.send(number)
    code, text = child.wait()
    assert code == 128 + number, text
    assert "interrupted. Everything learned is written; the same command continues." in text and "Traceback" not in text
    done = len(read_journal(run / "journal.bin")[1])
    assert 4 <= done < 12 and newest_snapshot(run)[0] == done
    assert main(["tune", recipe]) == 0
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second, recipe, tmp_path):
    original = qzo.tune.per_example_loss

    def slow(model, batch, variants):
        if (tmp_path / "run" / "metrics.jsonl").exists():
            (tmp_path / "started").touch()
            time.sleep(60)
        return original(model, batch, variants)

    child = Child("tune", recipe, before=lambda: setattr(qzo.tune, "per_example_loss", slow))
    while not (tmp_path / "started").exists():
        time.sleep(0.001)
    child.send(signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    child.send(second)
    assert child.wait()[0] == -second and time.monotonic() - began < 5


def test_interrupted_before_the_first_step(recipe, tmp_path):
    child = Child("tune", recipe, before=lambda: setattr(qzo.tune, "load_base", lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    code, text = child.wait()
    assert code == 130 and "qzo tune: interrupted" in text and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def half(llama4, sentiment, tmp_path_factory) -> tuple[Path, str]:
    """A run that was killed after seven steps (snapshots of 3 and 6), and its recipe. Not to be written to."""
    base = tmp_path_factory.mktemp("half")
    path = write_recipe(base / "recipe.yaml", llama4, sentiment, **KEYS)
    assert Child("tune", path, before=lambda: kill_at(Metrics, "write", 9)).wait()[0] == -signal.SIGKILL
    assert sorted(p.name for p in (base / "run" / "snapshots").iterdir()) == ["step-000003", "step-000006"]
    assert records_in(base / "run") == 7
    return base / "run", path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def shorten(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def append(path: Path, text: str) -> None:
    path.write_bytes(path.read_bytes() + text.encode())


STATE = Path("snapshots/step-000006/state.safetensors")
DAMAGE = {
    "nothing": (lambda run: None, ""),
    "torn record": (lambda run: shorten(run / "journal.bin", 5), "step 6) is torn"),
    "lost record": (lambda run: shorten(run / "journal.bin", RECORD), ""),
    "half a record more": (lambda run: append(run / "journal.bin", "x" * 9), "torn"),
    "flipped bit in the last record": (lambda run: flip(run / "journal.bin", -10), "torn"),
    "flipped bit in the newest snapshot": (lambda run: flip(run / STATE, -10), "step-000006: damaged snapshot passed over"),
    "truncated newest snapshot": (lambda run: shorten(run / STATE, 10), "step-000006: damaged snapshot passed over"),
    "no manifest": (lambda run: (run / STATE).with_name("manifest.json").unlink(), "damaged snapshot passed over"),
    "newest snapshot gone": (lambda run: shutil.rmtree((run / STATE).parent), ""),
    "no snapshots": (lambda run: shutil.rmtree(run / "snapshots"), ""),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), ""),
    "torn metrics": (lambda run: shorten(run / "metrics.jsonl", 50), ""),
    "metrics ahead": (lambda run: append(run / "metrics.jsonl", '{"step": 7, "loss": 0}\n{"step": 8'), ""),
    "no recipe": (lambda run: (run / "recipe.yaml").unlink(), ""),
    "half a snapshot": (lambda run: shutil.copytree(run / "snapshots/step-000003", run / "snapshots/.tmp-step-000009"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_goes_on(case, half, whole, tmp_path, capsys):
    damage, warns = DAMAGE[case]
    run = shutil.copytree(half[0], tmp_path / "run")
    damage(run)
    assert main(["tune", half[1], f"output_dir={run}"]) == 0
    assert warns in (err := capsys.readouterr().err) and ("warning: " in err) == bool(warns)
    assert outcome(run) == outcome(whole)
    assert (run / "recipe.yaml").exists() and (run / "report.md").exists()
    if case == "no metrics":
        assert [after for after, _ in evaluations(run)] == [10, 12] and "unknown" in (run / "report.md").read_text()
    else:
        assert evaluations(run) == evaluations(whole)


def test_another_recipe_stops_with_a_diff(half, tmp_path, capsys):
    run = shutil.copytree(half[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for extra in ([], ["--dry-run"]):
        assert main(["tune", half[1], f"output_dir={run}", "lr=0.02", "seed=3", *extra]) == 2
        err = capsys.readouterr().err
        assert "lr: 0.01 -> 0.02" in err and "seed: 0 -> 3" in err and "output_dir:" not in err and "--restart" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_restart_keeps_the_old_folder(half, whole, tmp_path, capsys):
    run = shutil.copytree(half[0], tmp_path / "run")
    old = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["tune", half[1], f"output_dir={run}", "model=/nowhere", "--restart"]) == 2
    assert run.exists() and not (tmp_path / "run.old1").exists(), "nothing moves before the input is known to be good"
    for number in (1, 2):
        assert main(["tune", half[1], f"output_dir={run}", "steps=2", "--restart"]) == 0
        assert f"the old run is kept in {tmp_path}/run.old{number}" in capsys.readouterr().err
    kept = tmp_path / "run.old1"
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == old
    assert len(read_journal(run / "journal.bin")[1]) == 2


def test_a_finished_run_does_nothing(whole, capsys):
    keep = {path: (path.stat().st_ino, path.read_bytes()) for path in whole.rglob("*") if path.is_file()}
    assert main(["tune", str(whole.with_name("recipe.yaml"))]) == 0
    out, err = capsys.readouterr()
    assert "accuracy" in out and not err
    for name in ("journal.bin", "report.md", "recipe.yaml"):
        assert (whole / name).read_bytes() == keep[whole / name][1]
    assert {path for path in whole.rglob("*") if path.is_file()} == keep.keys()
    assert all(path.stat().st_ino == keep[path][0] for path in (whole / "snapshots").rglob("*") if path.is_file())
