"""What a run shows: the line of progress, and metrics.jsonl."""

import io
import json

import numpy as np
import pytest

from qzo.errors import RunFailed
from qzo.metrics import Metrics, cut_back, read_metrics
from qzo.progress import Progress, Steps, Still


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("qzo.progress.monotonic", lambda: now[0])
    return now


def test_plain_lines_at_most_every_few_seconds(clock):
    stream = io.StringIO()
    with Progress("tune", 20, stream=stream, every=5) as progress:
        for done in range(1, 21):
            clock[0] += 1
            progress.update(done, loss=1 / 3)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[1] == "tune 6/20  loss 0.3333  ETA 14s"
    assert "ETA" not in lines[-1] and "\r" not in stream.getvalue()


def test_a_terminal_rewrites_one_line(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress("evaluate", 3, stream=stream) as progress:
        progress.update(1, note="x" * 100)
        progress.update(2)
        clock[0] += 1
        progress.update(2)
        progress.update(3)
    first, second, third = stream.getvalue().split("\r")[1:]
    assert len(first) == 39 and first.startswith("evaluate 1/3  note xxx")
    assert len(second) == 39 and second.rstrip() == "evaluate 2/3  ETA 1s"
    assert third.endswith("\n") and third.rstrip() == "evaluate 3/3"


def test_eta_counts_only_this_run(clock):
    stream = io.StringIO()
    progress = Progress("tune", 1000, start=900, stream=stream)
    clock[0] += 100
    progress.update(910)
    assert stream.getvalue() == "tune 910/1000  ETA 15m00s\n"


@pytest.mark.parametrize(("rate", "text"), [(0.5, "1s"), (59.2, "1m00s"), (3661, "1h01m"), (400_000, "111h06m")])
def test_durations(clock, rate, text):
    stream = io.StringIO()
    progress = Progress("x", 2, stream=stream)
    clock[0] += rate
    progress.update(1)
    assert stream.getvalue().endswith(f"ETA {text}\n")


def test_nothing_done_nothing_broken(clock):
    stream = Terminal()
    Progress("x", 0, stream=stream).close()
    assert stream.getvalue() == ""
    with pytest.raises(KeyError), Progress("x", 2, stream=stream) as progress:
        progress.update(0)
        raise KeyError
    assert stream.getvalue() == "\rx 0/2\n"


def line(step, loss, size, tokens):
    return {"step": step, "loss": loss, "abs_d": size, "lr": 0.018, "tokens": tokens, "peak_memory": 8_650_000_000}


def test_the_line_of_a_run(clock):
    """Means over the group, those that are finite; the time of an evaluation counts for no rate; the last group may be short."""
    stream = io.StringIO()
    steps = Steps(Progress("tune", 107, 100, stream, every=0.0), 3, 107, tokens=1000)
    for step, loss in enumerate((0.5, None, 1.0, 2.0, None, None, None), 100):
        clock[0] += 2
        steps(line(step, loss, loss, 1000 + 100 * (step - 99)))
        if step == 101:
            clock[0] += 60
            steps({"after": 102, "evaluation": {}, "peak_memory": 1})
    assert stream.getvalue().splitlines() == [
        "tune 102/107  loss 0.5000  |d| 0.5  lr 0.018  tokens/s 50  GB 8.65  ETA 10s",
        "tune 105/107  loss 1.5000  |d| 1.5  lr 0.018  tokens/s 50  GB 8.65  ETA 28s",
        "tune 107/107  loss nan  |d| nan  lr 0.018  tokens/s 50  GB 8.65",
    ]


def test_the_line_after_an_evaluation_within_a_group(clock):
    stream = io.StringIO()
    steps = Steps(Progress("tune", 2, 0, stream, every=0.0), 2, 2)
    steps(line(0, 1.0, 1.0, 70))
    clock[0] += 60
    steps({"after": 1, "evaluation": {}})
    clock[0] += 1
    steps(line(1, 2.0, 2.0, 100))
    assert stream.getvalue() == "tune 2/2  loss 1.5000  |d| 1.5  lr 0.018  tokens/s 30  GB 8.65\n"


@pytest.mark.parametrize("direction,do", [("latent", "Raise eps, or batch_size;"), ("realized", "or use direction=latent;")])
def test_a_run_that_stands_still_says_so_once(direction, do, capsys):
    still = Still(direction)
    sizes = [*[0.0] * 19, 0.1, *[0.0] * 10, None, *[0.0] * 19]
    for step, size in enumerate(sizes):
        still(line(step, 1.0, size, 0) | {"skipped": size is None})
    still({"after": len(sizes), "evaluation": {}})
    assert capsys.readouterr().err == ""
    for step in range(50):
        still(line(step, 1.0, 0.0, 0) | {"skipped": False})
    said = capsys.readouterr().err
    assert said.startswith("warning: |d| was 0 in the last 20 steps, so nothing moved.") and do in said and said.count("\n") == 1


def test_listeners_get_the_lines_as_written(tmp_path):
    heard = []
    with Metrics(tmp_path / "m") as metrics:
        metrics.write({"step": 0})
        metrics.listeners.append(heard.append)
        metrics.write({"step": 1, "loss": float("nan")})
    assert heard == lines_of(tmp_path / "m")[1:] == [{"step": 1, "loss": None, "nonfinite": {"loss": "nan"}}]


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_metrics_lines(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 0, "loss": np.float32(0.5), "note": "Größe"})
    assert lines_of(path) == [{"step": 0, "loss": 0.5, "note": "Größe"}]
    metrics.write({"step": 1, "loss": float("nan"), "d": np.float32("-inf"), "lr": 0.1})
    metrics.close()
    strange = {"loss": "nan", "d": "-inf"}
    assert lines_of(path)[1] == {"step": 1, "loss": None, "d": None, "lr": 0.1, "nonfinite": strange}


def test_metrics_lines_within_lines(tmp_path):
    with Metrics(tmp_path / "m") as metrics:
        metrics.write({"after": 3, "evaluation": {"f1": np.float32("inf"), "n": 4, "parts": (0.5, float("nan"))}})
    assert read_metrics(tmp_path / "m") == [
        {"after": 3, "evaluation": {"f1": None, "n": 4, "parts": [0.5, None]},
         "nonfinite": {"evaluation.f1": "inf", "evaluation.parts.1": "nan"}},
    ]  # fmt: skip
    assert read_metrics(tmp_path / "none") == []


def test_metrics_go_on(tmp_path):
    for step in range(3):
        metrics = Metrics(tmp_path / "m")
        metrics.write({"step": step})
        metrics.close()
    assert [line["step"] for line in lines_of(tmp_path / "m")] == [0, 1, 2]


@pytest.mark.parametrize("torn", ["", '{"step": 1, "lo', '{"step": 1}', "\n[1]\n"])
def test_cut_back(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    kept = [{"after": 0}, {"step": 0}, {"step": 1, "loss": None}, {"after": 2}]
    lines = [*kept, {"step": 2}, {"after": 3}, {"step": 10, "accuracy": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    cut_back(path, 2)
    assert lines_of(path) == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut_back(path, 0)
    assert lines_of(path) == kept[:1]


def test_cut_back_without_a_file(tmp_path):
    cut_back(tmp_path / "none", 3)
    assert list(tmp_path.iterdir()) == []


def test_metrics_in_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="cannot be read or written"):
        Metrics(tmp_path / "file" / "metrics.jsonl")
