"""Runs on plain text: quantized pre-training, and its perplexity."""

import json
import math

import pytest
import torch
from tiny_runs import sentences, stop_at, write_recipe

from qzo.cli import main
from qzo.errors import Interrupted
from qzo.evaluate import perplexity
from qzo.model.load import load_model
from qzo.recipe import load_recipe
from qzo.rebuild import tuned_state
from qzo.tune import Tuner

TEXT = {"task": "text", "prompt": None, "choices": None, "label": None, "max_length": 16}


@pytest.fixture
def texts(tmp_path):
    """{split}.txt of two parts of the sentences."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"{record['sentence']} It was {['terrible', 'great'][record['label']]} .\n" for record in sentences()]
    for split, part in (("train", lines[:48]), ("validation", lines[48:])):
        (folder / f"{split}.txt").write_text("".join(part))
    return folder


@pytest.fixture
def tuner(llama4, texts, tmp_path):
    def make(**keys):
        return Tuner(load_recipe(write_recipe(tmp_path / "recipe.yaml", llama4, texts, **TEXT, **keys)), "tiny", "qzo tune")

    return make


@pytest.mark.parametrize("keys", [{}, {"stacked": True, "micro_batch": 2}, {"method": "quzo", "eps": 0.5, "lr": 2.0}], ids=str)
def test_a_run_on_text(tuner, llama4, texts, keys):
    run = tuner(**{"steps": 30, "lr": 0.05, "train_examples": 20, **keys})
    figures = run.run()
    assert len(run.train) == 20
    loaded = load_model(str(llama4), "cpu", "fp32")
    alone = perplexity(loaded.model, loaded.tokenizer(), texts / "validation.txt", 16)
    before = figures["before"]
    assert before["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6) == pytest.approx(math.exp(before["loss"]))
    assert (before["tokens"], before["examples"], before["truncated"]) == (alone["tokens"], alone["windows"], 0)
    assert figures["after"]["loss"] < before["loss"] - 0.2
    report, page = ((run.folder.path / name).read_text() for name in ("report.md", "report.html"))
    shown = [f"{figures[when]['perplexity']:.4f}" for when in ("before", "after")]
    assert f"| perplexity  | {shown[0].ljust(6)} | {shown[1]}" in report and "| loss " in report
    assert f"<b>{shown[0]} → {shown[1]}</b><small>validation perplexity" in page and "Validation perplexity</figcaption>" in page


def test_evaluate_gives_the_same_numbers(tuner, llama4, texts, capsys):
    run = tuner(eval_examples=5)
    figures = run.run()
    folder, model = str(run.folder.path), str(llama4)

    def evaluated(*arguments):
        assert main(["evaluate", *arguments, "--json", "--dtype", "fp32"]) == 0
        return json.loads(capsys.readouterr().out)

    found = evaluated(folder)
    assert {key: found[key] for key in figures["after"]} == pytest.approx(figures["after"], rel=1e-6)
    file = evaluated(folder, "--perplexity", str(texts / "validation.txt"), "--window", "16", "--limit-windows", "5")
    assert (file["perplexity"], file["tokens"]) == (pytest.approx(found["perplexity"], rel=1e-6), found["tokens"] == 75 and 75)
    task = evaluated(model, "--task", "text", "--data", str(texts), "--max-length", "16", "--batch-size", "3")
    file = evaluated(model, "--perplexity", str(texts / "validation.txt"), "--window", "16")
    assert (task["perplexity"], task["tokens"]) == (pytest.approx(file["perplexity"], rel=1e-6), file["tokens"])
    assert evaluated(model, "--task", "text", "--data", str(texts), "--max-length", "16", "--limit", "5")["loss"] == pytest.approx(figures["before"]["loss"])


def test_a_run_continues_and_is_rebuilt(tuner, tmp_path):
    with pytest.raises(Interrupted):
        stop_at(tuner(), 3).run()
    run = tuner()
    run.run()
    journal = run.folder.journal.read_bytes()
    steps, state = tuned_state(str(run.folder.path), run.loaded.folder, torch.device("cpu"), snapshots=False)
    assert steps == 6 and all(torch.equal(value, run.targets[0].state()[name]) for name, value in state.items())
    whole = tuner(output_dir=str(tmp_path / "whole"))
    whole.run()
    assert whole.folder.journal.read_bytes()[-6 * 24 :] == journal[-6 * 24 :]


def test_dry_run(llama4, texts, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, texts / "train.txt", **TEXT | {"train_examples": 7})
    assert main(["tune", recipe, "--dry-run"]) == 0
    assert "data: 7 training examples (1 rows and 15 tokens each)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"prompt": "x"}, "task text: prompt set; expected no such setting: it has no prompt"),
        ({"objective": "accuracy"}, "recipe, objective: accuracy, with task text; expected a task with choices"),
        ({"objective": "f1"}, "recipe, objective: f1, with task text"),
        ({"train_split": "test"}, "no test.jsonl and no test.txt in it (it holds short.txt, train.txt, validation.txt)"),
        ({"max_length": 256, "eval_split": "short"}, "split short: 3 tokens; expected at least one window of 256"),
    ],
)
def test_refused(llama4, texts, tmp_path, capsys, keys, says):
    (texts / "short.txt").write_text("aaa")
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, texts, **TEXT | keys)
    for verb in (["tune", recipe], ["tune", recipe, "--dry-run"]):
        assert main(verb) == 2
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message


def test_evaluate_refuses_before_it_loads(texts, capsys):
    assert main(["evaluate", "/no/such/model", "--task", "text", "--data", str(texts), "--split", "test"]) == 2
    assert "no test.jsonl and no test.txt" in capsys.readouterr().err
