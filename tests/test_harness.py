"""`qzo evaluate --lm-eval`: the harness scores the live model as a plain loop does."""

import json

import pytest
import torch
from fake_harness import tasks  # noqa: F401

from qzo.cli import main
from qzo.model.load import load_model
from qzo.rebuild import load_run

def accuracy(loaded, sentiment, limit=None):
    """Of the two words after each prompt, by hand."""
    tokenizer, right = loaded.tokenizer(), 0
    records = [json.loads(line) for line in (sentiment / "validation.jsonl").read_text().splitlines()][:limit]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" terrible", " great")]
    assert all(len(word) == 1 for word in words)
    for record in records:
        ids = torch.tensor([tokenizer(f"{record['sentence']} It was", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = loaded.model(ids).logits[0, -1, torch.tensor(words).flatten()]
        right += int(scores.argmax()) == record["label"]
    return right / len(records)


def ask(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("limit", [None, 6])
def test_a_run_and_its_base(limit, recipe, tasks, sentiment, llama4, tmp_path, capsys):  # noqa: F811
    assert main(["tune", recipe, "steps=20", "lr=0.05", "eval_every=20"]) == 0
    limits = [] if limit is None else ["--limit", limit]
    found = {}
    for name, model in (("run", tmp_path / "run"), ("base", llama4)):
        capsys.readouterr()
        assert ask(model, "--lm-eval", tasks, "--json", "--batch-size", 3, "--dtype", "fp32", *limits) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["run"].pop("steps") == 20 and set(found["run"]) == {"tiny_sentiment acc", "tiny_sentiment acc_stderr"}
    assert found["run"]["tiny_sentiment acc"] == pytest.approx(accuracy(load_run(str(tmp_path / "run"), "cpu")[0], sentiment, limit))
    assert found["base"]["tiny_sentiment acc"] == pytest.approx(accuracy(load_model(str(llama4), "cpu", "fp32"), sentiment, limit))
    assert found["run"] != found["base"]


def test_what_it_prints(tasks, llama4, capsys):  # noqa: F811
    assert ask(llama4, "--lm-eval", tasks, "--dtype", "fp32") == 0
    assert "tiny_sentiment acc: " in capsys.readouterr().out


def test_wrong_tasks(tasks, llama4, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    assert ask("nowhere", "--lm-eval", " , ") == 2
    assert "no task" in capsys.readouterr().err
    for wrong, said in (("nothing_like_it", "neither a task that lm-eval knows"), (tmp_path / "empty", "a folder without tasks")):
        assert ask("nowhere", "--lm-eval", f"{tasks},{wrong}") == 2
        assert said in capsys.readouterr().err
    (tasks / "tiny.yaml").write_text((tasks / "tiny.yaml").read_text().replace("validation.jsonl", "absent.jsonl"))
    assert ask(llama4, "--lm-eval", tasks) == 2
    assert "the data of a task cannot be read" in capsys.readouterr().err


def test_without_the_package(llama4, monkeypatch, capsys):
    monkeypatch.setattr("qzo.harness.find_spec", lambda name: None)
    assert ask(llama4, "--lm-eval", "arc_easy") == 2
    assert "pip install 'qzo[lm-eval]'" in capsys.readouterr().err
