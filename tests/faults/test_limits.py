"""A full disk (a limit on the size of a file) and memory that runs out: exit codes 1 and 3, and nothing half-written."""

import resource
import signal

import pytest
import torch
from children import Child
from tiny_runs import write_recipe

import qzo.tune
from qzo.checkpoint import newest_snapshot
from qzo.cli import main
from qzo.journal import read_journal
from qzo.metrics import read_metrics


def limit(size):
    """Files grow to at most `size` bytes in this process."""

    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


@pytest.fixture(scope="module")
def finished(llama4, sentiment, tmp_path_factory):
    base = tmp_path_factory.mktemp("finished")
    assert main(["tune", write_recipe(base / "recipe.yaml", llama4, sentiment)]) == 0
    return base / "run"


def full(child):
    code, text = child.wait()
    assert code == 1 and "Traceback" not in text, text
    message = text[text.index("qzo ") :]
    assert "File too large" in message and text.count("qzo ") == 1, text
    return message


# What a limit of so many bytes hits first, and what the message names.
TUNE = {"header": (1000, "journal.bin"), "snapshot": (4000, "snapshots/step-000004"), "plot": (12000, "run/loss.png, report.md")}


@pytest.mark.parametrize("case", TUNE)
def test_tune(case, llama4, sentiment, finished, tmp_path):
    size, named = TUNE[case]
    recipe, run = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment), tmp_path / "run"
    message = full(Child("tune", recipe, before=limit(size)))
    assert named in message, message
    assert main(["tune", recipe]) == 0
    records, expected = (read_journal(folder / "journal.bin")[1] for folder in (run, finished))
    assert [r.coefs.tobytes() for r in records] == [r.coefs.tobytes() for r in expected]
    assert [m["step"] for m in read_metrics(run / "metrics.jsonl") if "step" in m] == list(range(6))
    assert newest_snapshot(run)[2] == newest_snapshot(finished)[2]
    assert (run / "loss.png").stat().st_size > 12000


@pytest.mark.parametrize(("size", "kept"), [(1000, []), (30_000, ["out.partial"])], ids=["in the layer", "after it"])
def test_quantize(size, kept, llama16, tmp_path):
    command = ["quantize", llama16, "-o", tmp_path / "out", "--method", "rtn", "--device", "cpu"]
    message = full(Child(*command, before=limit(size)))
    assert "out.partial" in message and "Free some" in message
    assert [path.name for path in tmp_path.iterdir()] == kept
    code, text = Child(*command).wait()
    assert code == 0 and ("continues after layer 1 of 1" in text) == bool(kept), text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["gptq", "hf"])
def test_export(kind, finished, tmp_path):
    message = full(Child("export", finished, "-o", tmp_path / "out", "--format", kind, before=limit(30_000)))
    assert "out.partial" in message and "Free some" in message
    assert not list(tmp_path.iterdir())


def raising(error):
    def call(*_, **__):
        raise error

    return call


HINTS = {
    "quantize": ("qzo.quantize.quantize_model", "Use --device cpu"),
    "tune": ("qzo.tune.tune_model", "Lower micro_batch or max_length"),
    "evaluate": ("qzo.score.score", "Lower --batch-size"),
    "export": ("qzo.export.export_run", "more memory"),
    "replay": ("qzo.replay.replay_run", "more memory"),
}
ERRORS = {
    "host": MemoryError(),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
}


@pytest.mark.parametrize("verb", HINTS)
@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory(verb, kind, recipe, monkeypatch, capsys):
    place, hint = HINTS[verb]
    monkeypatch.setattr(place, raising(ERRORS[kind]))
    arguments = {"tune": [recipe], "quantize": ["m", "-o", "o"], "export": ["r", "-o", "o"]}.get(verb, ["m"])
    assert main([verb, *arguments]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"qzo {verb}: out of memory (") and hint in err and err.count("\n") == 1
    assert "Tried to allocate 2.00 GiB" in err if kind == "gpu" else "host" in err


def test_the_cpu_allocator_says_it_in_its_own_way(recipe, monkeypatch, capsys):
    monkeypatch.setattr("qzo.tune.tune_model", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    assert main(["tune", recipe]) == 3
    assert "out of memory" in capsys.readouterr().err


def test_another_runtime_error_is_a_bug_and_shows(recipe, monkeypatch):
    monkeypatch.setattr("qzo.tune.tune_model", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["tune", recipe])


def test_out_of_memory_in_a_step_loses_nothing(recipe, finished, tmp_path, monkeypatch):
    original, calls = qzo.tune.per_example_loss, []

    def sometimes(*args):
        calls.append(args)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args)

    monkeypatch.setattr("qzo.tune.per_example_loss", sometimes)
    assert main(["tune", recipe]) == 3
    assert len(read_journal(tmp_path / "run" / "journal.bin")[1]) == 3
    assert main(["tune", recipe]) == 0
    assert newest_snapshot(tmp_path / "run")[2] == newest_snapshot(finished)[2]


def test_quantize_out_of_memory_leaves_no_folder(llama16, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qzo.quantize.walk.Walk.run", raising(torch.OutOfMemoryError("CUDA out of memory.")))
    assert main(["quantize", str(llama16), "-o", str(tmp_path / "out"), "--method", "rtn", "--device", "cpu"]) == 3
    assert "CUDA out of memory" in capsys.readouterr().err and not list(tmp_path.iterdir())
