"""Whole runs of the tiny model: what never moves, what comes out the same twice, and every setting there and back."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import write_recipe

from qzo.checkpoint import newest_snapshot, state_hash, write_snapshot
from qzo.cli import main
from qzo.journal import FLAG_CLIPPED, read_journal
from qzo.metrics import read_metrics
from qzo.model.files import Folder
from qzo.recipe import load_recipe
from qzo.rebuild import load_run, tuned_state
from qzo.tune import Tuner
from qzo.zo.schedule import schedule

DENSE = {"dense": True, "dense_lr": 1e-3, "dense_eps": 1e-2}


@pytest.fixture
def tune(llama4, sentiment, tmp_path):
    """tune(**keys) runs a recipe to its end and returns the run's folder."""

    def run(**keys):
        path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **keys)
        assert main(["tune", path]) == 0
        return tmp_path / "run"

    return run


@pytest.fixture
def tuner(llama4, sentiment, tmp_path):
    def make(**keys):
        path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **keys)
        return Tuner(load_recipe(path), "tiny", "qzo tune")

    return make


def bytes_of(tuner):
    """Every tensor that the run holds: parameters, buffers, and the fp32 masters of the dense ones."""
    tensors = {**tuner.loaded.model.state_dict(), **dict(tuner.loaded.model.named_buffers()), **tuner._state()}
    return {name: (t.dtype, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("steps", [30, pytest.param(1000, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("keys", [{}, {"eps_mode": "absolute", "eps": 1e-3}], ids=["relative", "absolute"])
def test_lr_0_changes_no_byte(steps, keys, tuner):
    run = tuner(**{**DENSE, "dense_lr": 0.0}, **keys, lr=0.0, steps=steps, save_every=1000, batch_size=2)
    before = bytes_of(run)
    assert any(name.endswith("/dense") for name in before) and any("embed" in name for name in before)
    run.run()
    assert bytes_of(run) == before
    records = read_journal(run.folder.journal)[1]
    assert len(records) == steps and all(r.projected.any() and not r.coefs.any() for r in records)


@pytest.mark.parametrize("stacked", [False, True])
def test_eps_0_gives_equal_losses(stacked, tuner):
    run = tuner(stacked=stacked, directions=2)
    run.targets[0].eps = 0.0
    closure = partial(run._losses, run._batch(0))
    losses = run.optimizer.losses(closure, 0, [(0, 1), (0, -1), (1, 1), (1, -1)])
    assert len(set(losses.tolist())) == 1
    assert losses[0] == closure()[0]


def test_stacked_and_separate_forwards_measure_the_same(tuner):
    found = []
    for stacked in (False, True):
        run = tuner(stacked=stacked)
        found.append(run.optimizer.losses(partial(run._losses, run._batch(3)), 3, [(0, 1), (0, -1)]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert found[0][0] != found[0][1]


def test_micro_batches_measure_the_same(tuner):
    found = []
    for micro in (1, 2, 3, 4, None):
        run = tuner(micro_batch=micro)
        found.append([run.optimizer.losses(partial(run._losses, run._batch(step)), step, [(0, 1), (0, -1)]) for step in range(3)])
    for other in found[:-1]:
        for losses, expected in zip(other, found[-1], strict=True):
            torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


def test_the_same_run_twice_gives_the_same_journal(tune, tmp_path):
    journals = []
    for _ in range(2):
        run = tune()
        journals.append((run / "journal.bin").read_bytes())
        shutil.rmtree(run)
    assert journals[0] == journals[1]


def test_threads_are_recorded_and_used_again(llama4, sentiment, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, threads=None, steps=2)
    torch.set_num_threads(2)
    try:
        assert main(["tune", recipe]) == 0
        assert read_journal(tmp_path / "run" / "journal.bin")[0]["threads"] == 2
        torch.set_num_threads(1)
        assert main(["tune", recipe]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


METHODS = {
    "as published": {"eps_mode": "absolute", "eps": 1e-3, "lr": 1e-6, "noise": "gaussian", "clip": 100.0},
    "absolute": {"eps_mode": "absolute", "eps": 1e-3, "lr": 1e-6, "clip": 0.5},
    "relative gaussian": {"noise": "gaussian", "clip_median": 1.5, "steps": 16},
    "directions": {"directions": 3},
    "stacked directions": {"directions": 3, "stacked": True},
    "dense": DENSE,
    "dense gaussian directions": {**DENSE, "noise": "gaussian", "directions": 2},
    "micro-batches": {"micro_batch": 3},
    "half precision": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "generation": {"prompt": '"{sentence} It was"', "choices": None, "label": None, "completion": '" {label}"', "max_length": 64},
}


@pytest.mark.parametrize("method", METHODS)
def test_runs_resumes_replays_and_exports(method, tune, tmp_path, monkeypatch, capsys):
    """A run in two parts replays from its journal alone to the state of every snapshot, and exports."""
    seen = {}

    def write(folder, step, state, meta):
        seen[step] = state_hash(state)
        return write_snapshot(folder, step, state, meta)

    monkeypatch.setattr("qzo.tune.write_snapshot", write)
    whole = tune(save_every=2, **METHODS[method])
    first = dict(seen)
    header, records = read_journal(whole / "journal.bin")
    steps = len(records)
    assert sorted(first) == list(range(2, steps + 1, 2)) and len(set(first.values())) == len(first)
    assert all(len(r.coefs) == header["count"] and r.coefs.any() for r in records)
    if "clip" in METHODS[method] and METHODS[method]["clip"] < 1 or "clip_median" in METHODS[method]:
        assert any(r.flags & FLAG_CLIPPED for r in records)
    for step in first:
        assert main(["replay", str(whole), "--to", str(step)]) == 0
        assert f"state SHA-256 {first[step]}" in capsys.readouterr().out
    assert main(["replay", str(whole), "--verify"]) == 0
    assert f"equal to the snapshot of step {steps}" in capsys.readouterr().out

    half = tmp_path / "half"
    shutil.copytree(whole, half)
    size = 16 + 4 * (header["directions"] + header["count"])
    data = (half / "journal.bin").read_bytes()
    (half / "journal.bin").write_bytes(data[: len(data) - 3 * size])
    assert len(read_journal(half / "journal.bin")[1]) == steps - 3
    assert main(["tune", str(tmp_path / "recipe.yaml"), f"output_dir={half}"]) == 0
    assert newest_snapshot(half)[2] == newest_snapshot(whole)[2]

    assert main(["export", str(whole), "-o", str(tmp_path / "a")]) == 0
    assert "logits equal" in capsys.readouterr().out
    assert main(["replay", str(whole), "-o", str(tmp_path / "b")]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_replay_of_the_first_steps_is_an_export_of_them(tune, llama4, tmp_path):
    run = tune()
    assert main(["replay", str(run), "--to", "0", "-o", str(tmp_path / "base")]) == 0
    assert (tmp_path / "base" / "model.safetensors").stat().st_size == (llama4 / "model.safetensors").stat().st_size
    loaded, _, steps = load_run(str(run), "cpu", to=0)
    assert steps == 0
    base = load_run(str(run), "cpu")[0]
    assert any(not torch.equal(a.scales, b.scales) for a, b in zip(loaded.layers.values(), base.layers.values(), strict=True))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2, 6])
def test_schedules(kind, warmup, tune):
    run = tune(schedule=kind, warmup=warmup)
    rates = [m["lr"] for m in read_metrics(run / "metrics.jsonl") if "step" in m]
    assert rates == pytest.approx([schedule(kind, 0.01, step, 6, warmup) for step in range(6)], rel=1e-12)
    for record, rate in zip(read_journal(run / "journal.bin")[1], rates, strict=True):
        assert record.coefs[0] == pytest.approx(np.float32(rate) * record.projected[0], rel=1e-6)


def test_evaluations_on_the_way(tune):
    run = tune(eval_every=2)
    assert [m["after"] for m in read_metrics(run / "metrics.jsonl") if "evaluation" in m] == [0, 2, 4, 6]


def test_snapshots_and_replays_on_a_snapshot_agree(tune, llama4):
    run = tune()
    for to in range(7):
        fast, slow = (tuned_state(str(run), Folder(llama4), torch.device("cpu"), to, snapshots)[1] for snapshots in (True, False))
        assert state_hash(fast) == state_hash(slow)


def test_a_run_that_diverges_stops_and_stops_again(tune, llama4, sentiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qzo.tune.per_example_loss", lambda model, batch, variants: torch.full((variants, batch.examples), float("nan")))
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, steps=30)
    for done in (10, 11):
        assert main(["tune", recipe]) == 1
        assert "10 steps in a row without a finite loss" in capsys.readouterr().err
        lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "step" in m]
        assert len(lines) == done and lines[-1]["loss"] is None and lines[-1]["nonfinite"] and lines[-1]["skipped"]
    state, base = (tuned_state(str(tmp_path / "run"), Folder(llama4), torch.device("cpu"), to)[1] for to in (11, 0))
    assert state_hash(state) == state_hash(base)
