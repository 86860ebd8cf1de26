"""Runs on chats: what is tuned and scored is what the assistant says."""

import json
import math
import shutil

import pytest
import torch
from tiny_runs import edit_json, sentences, stop_at, write_recipe

from qzo.cli import main
from qzo.data.messages import encode_chats
from qzo.data.tasks import get_task, load_examples
from qzo.errors import BadInput, Interrupted
from qzo.metrics import read_metrics
from qzo.model.load import load_model
from qzo.recipe import load_recipe
from qzo.rebuild import tuned_state
from qzo.tune import Tuner

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATS = {"task": "messages", "prompt": None, "choices": None, "label": None, "max_length": 128}


@pytest.fixture
def chats(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    records = [
        {"messages": [{"role": "user", "content": record["sentence"]}, {"role": "assistant", "content": ["bad .", "It was great"][record["label"]]}]}
        for record in sentences()
    ]
    for split, part in (("train", records[:40]), ("validation", records[40:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return folder


@pytest.fixture
def speaking(llama4_copy):
    (llama4_copy / "chat_template.jinja").write_text(TEMPLATE)
    return llama4_copy


@pytest.fixture
def tuner(speaking, chats, tmp_path):
    def make(**keys):
        return Tuner(load_recipe(write_recipe(tmp_path / "recipe.yaml", speaking, chats, **CHATS, **keys)), "tiny", "qzo tune")

    return make


@torch.no_grad()
def naive(model, tokenizer, chats):
    """(nats, tokens) over the assistant's tokens from the full logits of every chat alone."""
    encoded, _ = encode_chats(load_examples(get_task("messages"), chats, "validation"), tokenizer, 128)
    total = count = 0
    for one in encoded:
        ids = torch.tensor([[*one.rows[0], one.options[0].tokens[-1]]])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
        total += losses[list(one.options[0].places)].sum().item()
        count += len(one.options[0].tokens)
    return total, count


@pytest.mark.parametrize("keys", [{}, {"stacked": True, "micro_batch": 2}], ids=str)
def test_a_run_on_chats(tuner, speaking, chats, keys):
    run = tuner(steps=30, lr=0.005, **keys)
    figures = run.run()
    total, count = naive(load_model(str(speaking), "cpu", "fp32").model, run.tokenizer, chats)
    before = figures["before"]
    assert (before["tokens"], before["examples"], before["truncated"]) == (count, 24, 0)
    assert before["loss"] == pytest.approx(total / count, rel=1e-4)
    assert before["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert figures["after"]["loss"] < before["loss"] - 0.1
    assert all(m["loss"] > 0 for m in read_metrics(run.folder.metrics) if "loss" in m)
    report = (run.folder.path / "report.md").read_text()
    assert "| loss " in report and "| perplexity " in report


def test_evaluate_and_replay_of_such_a_run(tuner, speaking, chats, capsys):
    run = tuner()
    figures = run.run()
    assert main(["evaluate", str(run.folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in figures["after"]} == pytest.approx(figures["after"], rel=1e-5)
    steps, state = tuned_state(str(run.folder.path), run.loaded.folder, torch.device("cpu"), snapshots=False)
    assert steps == 6 and all(torch.equal(value, run.targets[0].state()[name]) for name, value in state.items())
    assert main(["evaluate", str(speaking), "--task", "messages", "--data", str(chats), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(figures["before"]["loss"], rel=1e-3)


def test_a_run_continues_and_notices_another_template(tuner, speaking):
    whole = tuner()
    whole.run()
    journal = whole.folder.journal.read_bytes()
    shutil.rmtree(whole.folder.path)

    run = tuner()
    with pytest.raises(Interrupted):
        stop_at(run, 3).run()
    (speaking / "chat_template.jinja").write_text(TEMPLATE.replace("<eos>", "<eos> "))
    with pytest.raises(BadInput, match="other examples than the run began with"):
        tuner()
    (speaking / "chat_template.jinja").write_text(TEMPLATE)
    run = tuner()
    run.run()
    assert run.folder.journal.read_bytes() == journal


@pytest.mark.parametrize(
    "change, keys, says",
    [
        (lambda model: (model / "chat_template.jinja").unlink(), {}, "tokenizer: no chat template"),
        (lambda model: None, {"prompt": "x"}, "task messages: prompt set"),
        (lambda model: None, {"objective": "accuracy"}, "recipe, objective: accuracy, with task messages; expected a task with choices"),
        (lambda model: None, {"objective": "f1"}, "recipe, objective: f1, with task messages; expected a task whose answer is generated"),
    ],
)
def test_refused(speaking, chats, tmp_path, capsys, change, keys, says):
    change(speaking)
    recipe = write_recipe(tmp_path / "recipe.yaml", speaking, chats, **CHATS | keys)
    for verb in (["tune", recipe], ["tune", recipe, "--dry-run"]):
        assert main(verb) == 2
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message


def test_a_bad_chat_is_named(speaking, chats, tmp_path, capsys):
    with (chats / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", speaking, chats, **CHATS)]) == 2
    assert "train.jsonl line 41: no token of the assistant" in capsys.readouterr().err


def test_a_chat_that_is_cut_is_counted(speaking, chats, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", speaking, chats, **CHATS | {"max_length": 16, "steps": 1})
    assert main(["tune", recipe]) == 0
    assert "40 of 40 chats lost their beginning (max_length=16)" in capsys.readouterr().err


def test_an_unreadable_template_is_no_traceback(speaking, chats, tmp_path, capsys):
    edit_json(speaking / "tokenizer_config.json", chat_template=None)
    (speaking / "chat_template.jinja").write_text("{% for")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", speaking, chats, **CHATS)]) == 2
    assert "the tokenizer's chat template cannot render it" in capsys.readouterr().err
