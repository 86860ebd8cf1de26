"""Objectives without a gradient: minus the accuracy, and minus the F1 of what the perturbed model writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from qzo_kernels import ops
from tiny_runs import stop_at, write_recipe

from qzo.cli import main
from qzo.data import generation
from qzo.data.batches import collate
from qzo.data.encode import encode_examples
from qzo.data.generation import Questions, encode_questions, per_example_f1
from qzo.data.loss import per_example_error
from qzo.data.tasks import Example, get_task
from qzo.errors import Interrupted
from qzo.evaluate import evaluate_task
from qzo.journal import FLAG_SKIPPED, read_journal
from qzo.metrics import read_metrics
from qzo.model.load import load_model
from qzo.recipe import diff, load_recipe
from qzo.tune import Tuner

PROMPTS = [f"a {word} {noun} . It was" for word in ("great", "dull", "lovely", "boring") for noun in ("film", "song", "plot")]
ANSWERS = {"task": "jsonl", "prompt": '"{prompt}"', "completion": '"{completion}"', "choices": None, "label": None,
           "objective": "f1", "max_length": 80, "batch_size": 3, "steps": 3, "eps": 0.2, "eval_examples": 2}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(llama4):
    torch.set_num_threads(1)
    found = load_model(str(llama4), "cpu", "fp32")
    return found.model, found.tokenizer()


@pytest.fixture(scope="module")
def answered(loaded):
    """Questions with the model's own answers: F1 is 1 without noise."""
    model, tokenizer = loaded
    prompts = encode_questions([Example(p, ("x",), 0, ("x",)) for p in PROMPTS], tokenizer, 80)[0]
    lines = generation.first_lines(model, tokenizer, [q.rows[0] for q in prompts])
    pairs = [(p, line) for p, line in zip(PROMPTS, lines, strict=True) if generation.f1(line, [line]) == 1.0]
    assert len(pairs) > 6
    return [Example(p, (line,), 0, (line,)) for p, line in pairs]


@pytest.fixture(scope="module")
def questions(answered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.options[0]}) + "\n" for e in answered))
    return folder


@pytest.fixture
def tuner(llama4, sentiment, questions, tmp_path):
    def make(**keys):
        data = questions if keys.get("objective") == "f1" else sentiment
        return Tuner(load_recipe(write_recipe(tmp_path / "recipe.yaml", llama4, data, **keys)), "tiny", "qzo tune")

    return make


def records_of(run):
    """What a run wrote, which is then taken away."""
    found = [(r.step, r.flags, r.loss.tobytes(), r.projected.tobytes(), r.coefs.tobytes()) for r in read_journal(run.folder.journal)[1]]
    shutil.rmtree(run.folder.path)
    return found


@torch.no_grad()
@pytest.mark.parametrize("options", [(" terrible", " great"), (" a dull film", " great", " not")], ids=["one token", "several"])
def test_the_error_is_minus_the_accuracy(loaded, options):
    model, tokenizer = loaded
    examples = [Example(p, options, i % len(options)) for i, p in enumerate(PROMPTS)]
    batch = collate(encode_examples(examples, tokenizer, 64)[0], 0)
    found = per_example_error(model, batch.rounded(), 2)
    assert found.shape == (2, 12) and set(found.flatten().tolist()) == {-1.0, 0.0} and torch.equal(found[0], found[1])
    assert -found[0].mean() == evaluate_task(model, tokenizer, get_task("sst2"), examples, 64, 12)["accuracy"]


@torch.no_grad()
def test_f1_is_that_of_the_evaluation(loaded, answered):
    model, tokenizer = loaded
    mixed = [*answered, Example(PROMPTS[0], ("x",), 0, ("It", "was it that was"))]
    batch = Questions(tuple(encode_questions(mixed, tokenizer, 80)[0]))
    found = per_example_f1(model, tokenizer, batch, 2)
    assert found.shape == (2, len(mixed)) and torch.equal(found[0], found[1])
    assert torch.equal(found[0, :-1], torch.full((len(answered),), -1.0)) and -1 < found[0, -1] <= 0
    scores = evaluate_task(model, tokenizer, get_task("jsonl"), mixed, 80, 5)
    assert -found[0].double().mean().item() == pytest.approx(scores["f1"], abs=1e-6)


@torch.no_grad()
def test_a_broken_model_is_not_a_number(loaded, answered):
    model, tokenizer = loaded
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, torch.nan))
    try:
        questions = Questions(tuple(encode_questions(answered[:2], tokenizer, 80)[0]))
        assert per_example_f1(model, tokenizer, questions).isnan().all()
        batch = collate(encode_examples([Example("It was", (" bad", " good"), 0)], tokenizer, 64)[0], 0)
        assert per_example_error(model, batch).isnan().all()
    finally:
        hook.remove()


@torch.no_grad()
def test_the_noise_is_on_while_the_model_writes(tuner, monkeypatch):
    """The answers under noise are those of a model whose scales are moved by hand."""
    run, written = tuner(**ANSWERS), []
    monkeypatch.setattr(generation, "f1", lambda answer, references: written.append(answer) or 0.5)
    batches, (scales,) = run._batch(0), run.targets
    run._losses(batches)
    calm = list(written)
    for sign in (1, -1):
        written.clear()
        run.optimizer.losses(lambda: run._losses(batches), 0, [(0, sign)])
        noisy = list(written)
        written.clear()
        kept = {name: value.clone() for name, value in scales.state().items()}
        state = torch.tensor([[run.recipe.seed, 0, 0]])
        for info, value in zip(scales.info(), scales.state().values(), strict=True):
            value.copy_(ops.perturb(value, state, torch.tensor([sign * run.recipe.eps]), info.uid, info.floor, True, False)[0])
        run._losses(batches)
        scales.load_state(kept)
        assert noisy == written != calm


@pytest.mark.parametrize("keys", [{"objective": "accuracy", "steps": 12}, ANSWERS], ids=lambda keys: keys["objective"])
def test_runs_repeat_stacked_in_pieces_and_in_two_parts(keys, tuner):
    run = tuner(**keys)
    run.run()
    losses = [m["loss"] for m in read_metrics(run.folder.metrics) if "loss" in m]
    assert all(-1 <= loss <= 0 for loss in losses) and min(losses) < 0
    expected = records_of(run)
    for other in ({"stacked": True}, {"micro_batch": 2}):
        run = tuner(**keys, **other)
        run.run()
        found = records_of(run)
        tolerance = {"atol": 2e-6, "rtol": 2e-6}  # sums in another order
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.frombuffer(one[3], np.float32), np.frombuffer(two[3], np.float32), **tolerance)
    run = tuner(**keys)
    with pytest.raises(Interrupted):
        stop_at(run, 2).run()
    run = tuner(**keys)
    run.run()
    assert main(["replay", str(run.folder.path), "--verify"]) == 0
    assert records_of(run) == expected


def test_a_step_that_measures_no_difference_is_a_step(tuner):
    """A tiny eps changes no choice: d is 0, the step is not skipped, and nothing moves."""
    run = tuner(objective="accuracy", eps=1e-6, steps=12, clip_median=3)
    before = {name: value.clone() for name, value in run.targets[0].state().items()}
    run.run()
    records = read_journal(run.folder.journal)[1]
    assert len(records) == 12 and not any(r.flags & FLAG_SKIPPED for r in records)
    assert all(r.projected.tolist() == [0.0] and r.coefs.tolist() == [0.0] for r in records)
    assert all(torch.equal(value, run.targets[0].state()[name]) for name, value in before.items())


@pytest.mark.parametrize("objective, captured", [("loss", True), ("accuracy", True), ("f1", False)])
def test_generation_is_never_captured(objective, captured, tuner, monkeypatch):
    asked = []

    class Graphs:
        def __init__(self, optimizer, loss, capture, rest):
            asked.append(capture)

    monkeypatch.setattr("qzo.tune.Graphs", Graphs)
    tuner(**ANSWERS if objective == "f1" else {"objective": objective})
    assert asked == [captured]


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"objective": "f1"}, "recipe, objective: f1, with task jsonl; expected a task whose answer is generated"),
        (ANSWERS | {"objective": "accuracy"}, "recipe, objective: accuracy, with task jsonl; expected a task with choices"),
        (ANSWERS | {"max_length": 50}, "max_length: 50; expected more than the 50 tokens that may be generated"),
        ({"objective": "bleu"}, 'objective: given "bleu", expected one of loss, accuracy, f1'),
        ({"streaming": True, "train_examples": "null"}, "train_examples: given null, expected a number, because streaming is true"),
    ],
)
def test_refused(keys, says, llama4, sentiment, questions, tmp_path, capsys):
    data = questions if "completion" in keys else sentiment
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4, data, **keys)]) == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message


def test_a_recipe_that_is_older_than_a_key_has_its_default(llama4, sentiment, tmp_path):
    new = load_recipe(write_recipe(tmp_path / "recipe.yaml", llama4, sentiment)).model_dump()
    old = {key: value for key, value in new.items() if key not in ("objective", "streaming")}
    assert diff(old, new) == []
    assert diff(old, new | {"objective": "accuracy"}) == ['objective: "loss" -> "accuracy"']


def test_the_estimate_counts_the_cache_of_a_generation(tuner, capsys):
    run = tuner(**ANSWERS)
    one, both = (run.fit.estimate(stacked=stacked).phases["step"]["activations"] for stacked in (False, True))
    cache = 2 * 2 * 16 * 1 * 3 * (run.fit.one.length + 50) * 4  # keys and values, 2 heads of 16, 1 layer, 3 rows, fp32
    assert one > cache and both == pytest.approx(2 * one, rel=1e-3)
    assert main(["tune", str(run.folder.path.with_name("recipe.yaml")), "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out
