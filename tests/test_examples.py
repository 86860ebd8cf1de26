"""The scripts of scripts/examples: short, and each does on a tiny model what it says."""

import re
import runpy
import sys

import pytest
import torch
from fake_harness import tasks  # noqa: F401
from tiny_scripts import SCRIPTS

from qzo.model.load import load_model

EXAMPLES = sorted((SCRIPTS / "examples").glob("*.py"))
TRAIN = ("plain_loop", "with_accelerate", "with_trainer")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"a {word} film . It was {word}\n" for word in ("great", "dull", "lovely") for _ in range(8)))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_short_and_tested():
    assert {path.stem for path in EXAMPLES} == {*TRAIN, "with_lm_eval"}
    for path in EXAMPLES:
        assert path.read_text().count("\n") <= 25, path.name


@pytest.mark.parametrize("name", TRAIN)
def test_tuning(name, run, llama4, texts, tmp_path):
    shown = run(name, llama4, texts, tmp_path / "out", 6)
    losses = [float(value) for value in re.findall(r"loss\W+([0-9.]+)", shown)]
    assert len(losses) == 6 + (name == "with_trainer") and losses[5] < losses[0]
    before, after = (load_model(str(folder), "cpu", "fp32") for folder in (llama4, tmp_path / "out"))
    assert all(torch.equal(layer.codes, after.layers[key].codes) and not torch.equal(layer.scales, after.layers[key].scales) for key, layer in before.layers.items())
    assert name == "with_accelerate" or after.tokenizer().pad_token is not None


def test_lm_eval(run, llama4, texts, tasks):  # noqa: F811
    shown = run("with_lm_eval", llama4, texts, tasks, 4)
    assert re.findall(r"after (\d) steps: {'tiny_sentiment': 0?\.\d+}", shown) == ["0", "4"]
