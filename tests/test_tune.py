"""A run whose host is one step behind the device, as on a GPU: the same journal, and nothing lost."""

import shutil

import pytest
import torch
from tiny_lanes import AtOnce
from tiny_runs import make_model, stop_at, write_recipe

from qzo.checkpoint import newest_snapshot
from qzo.errors import Interrupted, RunFailed
from qzo.journal import FLAG_SKIPPED, read_journal
from qzo.metrics import read_metrics
from qzo.model.stream import stream_codes
from qzo.quantize import quantize_model
from qzo.recipe import load_recipe
from qzo.tune import Tuner

LATE = [{}, {"save_every": 3, "eval_every": 2, "log_every": 1}, {"steps": 16, "clip_median": 1.5, "save_every": 5}]


@pytest.fixture
def tuner(llama4, sentiment, tmp_path):
    def make(late=1, **keys):
        path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **keys)
        run = Tuner(load_recipe(path), "tiny", "qzo tune")
        run.late = late
        return run

    return make


@pytest.mark.parametrize("keys", LATE)
def test_a_journal_one_step_late_is_the_same(keys, tuner, tmp_path, monkeypatch):
    """What a GPU does: step t is journaled while step t + 1 runs, and nothing is pending at a snapshot or an evaluation."""
    monkeypatch.setattr(Tuner, "evaluate", at_rest(Tuner.evaluate))
    monkeypatch.setattr(Tuner, "snapshot", at_rest(Tuner.snapshot))
    outcomes = []
    for late in (0, 1):
        run, behind = tuner(late, **keys), []
        launch = run.launch

        def launched(run=run, launch=launch, behind=behind):
            launch()
            behind.append(len(run.pending))

        run.launch = launched
        run.run()
        lines = [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")} for m in read_metrics(run.folder.metrics)]
        outcomes.append((run.folder.journal.read_bytes(), lines, newest_snapshot(run.folder.path)[2]))
        assert max(behind) == 1 + late
        shutil.rmtree(run.folder.path)
    assert outcomes[0] == outcomes[1]


OFFLOAD = [{"offload": "codes"}, {}, {"offload": "codes", "micro_batch": 3}]


@pytest.mark.parametrize("keys", OFFLOAD, ids=str)
def test_runs_are_the_same_wherever_the_codes_are(keys, tuner):
    """Begun with one value of `offload` and continued with the other: the records, tensors and scores of a run without."""
    outcomes = []
    for first, second in (({}, {}), (keys, {}), ({}, keys), (keys, keys)):
        same = {"stacked": True, "micro_batch": keys.get("micro_batch")}
        run = tuner(**{**same, **first})
        with pytest.raises(Interrupted):
            stop_at(run, 3).run()
        run = tuner(**{**same, **second})
        assert run.optimizer.steps == 0 and run.header["recipe"]["offload"] == first.get("offload", "none")
        results = run.run()
        records = [(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in read_journal(run.folder.journal)[1]]
        scores = [m["evaluation"] for m in read_metrics(run.folder.metrics) if "evaluation" in m]
        assert len(records) == 6 and len(scores) == 2 and results
        outcomes.append((records, newest_snapshot(run.folder.path)[2], scores))
        shutil.rmtree(run.folder.path)
    assert all(other == outcomes[0] for other in outcomes[1:])


@pytest.mark.parametrize("keys", [{}, {"micro_batch": 2}], ids=str)
def test_streamed_codes_give_the_same_run(keys, sentiment, tmp_path, monkeypatch):
    """A model of three layers whose two buffers are filled as soon as they may be."""
    monkeypatch.setattr("qzo.model.stream.Lanes", lambda device: AtOnce())
    quantize_model(str(make_model(tmp_path / "16", num_hidden_layers=3)), tmp_path / "4", "rtn", 4, 32, device="cpu")
    outcomes = []
    for streamed in (False, True):
        path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "4", sentiment, stacked=True, offload="codes", **keys)
        run = Tuner(load_recipe(path), "tiny", "qzo tune")
        if streamed:
            run.loaded.stream = stream_codes(run.loaded.model, run.loaded.device)
        run.run()
        outcomes.append((run.folder.journal.read_bytes(), newest_snapshot(run.folder.path)[2]))
        shutil.rmtree(run.folder.path)
    assert outcomes[0] == outcomes[1]


def at_rest(method):
    def checked(self, first, *others):
        assert not self.pending
        assert len(read_journal(self.folder.journal)[1]) == self.optimizer.steps
        return method(self, first, *others)

    return checked


@pytest.mark.parametrize("error", [RuntimeError("broken"), Interrupted("here", 15, "")], ids=["error", "interrupt"])
def test_nothing_pending_is_lost(error, tuner):
    run = tuner(steps=6, save_every=100)
    launch = run.launch

    def launched():
        if run.optimizer.steps == 4:
            assert len(run.pending) == 1
            raise error
        launch()

    run.launch = launched
    with pytest.raises(type(error)):
        run.run()
    assert [r.step for r in read_journal(run.folder.journal)[1]] == [0, 1, 2, 3]
    assert [m["step"] for m in read_metrics(run.folder.metrics) if "step" in m] == [0, 1, 2, 3]
    found = newest_snapshot(run.folder.path)
    assert found[0] == 4 if isinstance(error, Interrupted) else found is None


def test_the_first_error_is_shown(tuner, monkeypatch):
    run = tuner()
    monkeypatch.setattr("qzo.tune.Journal.append", lambda *_: raised(RunFailed("journal", "full")))
    with pytest.raises(RunFailed, match="full"):
        run.run()
    assert [m.step for m in run.pending] == [0, 1]


def raised(error):
    raise error


def test_a_run_that_diverges_stops_a_step_later(tuner, monkeypatch):
    monkeypatch.setattr("qzo.tune.per_example_loss", not_a_number)
    for done in (11, 12):
        run = tuner(steps=30)
        with pytest.raises(RunFailed, match="10 steps in a row"):
            run.run()
        assert len(read_journal(run.folder.journal)[1]) == newest_snapshot(run.folder.path)[0] == done


def test_a_short_run_without_a_finite_loss_fails(tuner, monkeypatch):
    monkeypatch.setattr("qzo.tune.per_example_loss", not_a_number)
    run = tuner(steps=3)
    with pytest.raises(RunFailed, match="3 steps in a row without a finite loss"):
        run.run()
    assert len(read_journal(run.folder.journal)[1]) == 3


def test_a_run_that_recovers_goes_on(tuner, monkeypatch):
    """Ten skipped steps at the end of a journal and a finite one after them."""
    with monkeypatch.context() as patch:
        patch.setattr("qzo.tune.per_example_loss", not_a_number)
        with pytest.raises(RunFailed):
            tuner(0, steps=30, save_every=20).run()
    run = tuner(steps=30, save_every=20)
    run.run()
    records = read_journal(run.folder.journal)[1]
    assert [bool(r.flags & FLAG_SKIPPED) for r in records] == [True] * 10 + [False] * 20


def not_a_number(model, batch, variants):
    return torch.full((variants, batch.examples), float("nan"))
