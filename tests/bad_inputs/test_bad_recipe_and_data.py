"""Recipes and data that cannot be used: the key with the nearest right one, or the file and the line."""

import json

import pytest
from tiny_runs import make_data, write_recipe

RECIPES = {
    "unknown key": (["learning_rat=0.1"], ["learning_rat: given an unknown key", "did you mean"]),
    "another trainer's key": (["learning_rate=0.1"], ["did you mean lr?"]),
    "two problems at once": (["epz=0.1", "steps=0"], ["2 problems", "did you mean eps?", "steps: given 0, expected a whole number >= 1"]),
    "wrong type": (["steps=many"], ['steps: given "many", expected a whole number >= 1']),
    "half a step": (["steps=1.5"], ["steps: given 1.5, expected a whole number"]),
    "out of range": (["eps=-1"], ["eps: given -1, expected a finite number > 0"]),
    "not finite": (["lr=.inf"], ["lr: given Infinity, expected a finite number >= 0"]),
    "not a choice": (["schedule=cosin"], ["schedule", "one of constant, linear, cosine"]),
    "no value": (["steps"], ["steps: given no value, expected an override as key=value"]),
    "warm-up longer than the run": (["warmup=7"], ["warmup: given 7, expected at most steps, which is 6"]),
    "two clips": (["clip=1", "clip_median=2"], ["clip: given together with clip_median"]),
    "dense without its rate": (["dense=true"], ["dense_lr: given nothing", "dense_eps: given nothing"]),
    "stacked and dense": (["dense=true", "dense_lr=0.1", "dense_eps=0.1", "stacked=true"], ["stacked", "dense: true"]),
    "unknown task": (["task=sst3", "prompt=null", "choices=null", "label=null"], ["task: 'sst3'", "Did you mean sst2?"]),
    "prompt for a built-in task": (["task=sst2"], ["prompt", "its prompt is built in"]),
    "one choice": (['choices=["yes"]'], ["a list of at least two texts"]),
    "prompt that reaches for more": (["prompt={sentence.__class__}"], ["plain field names in braces"]),
}


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_recipe(case, dry, recipe, refused, tmp_path):
    overrides, says = RECIPES[case]
    refused("tune", recipe, *overrides, *dry, says=says)
    assert not (tmp_path / "run").exists()


def test_recipe_files(refused, tmp_path):
    refused("tune", "qzo-llama", says=["unknown name", "expected one of "])
    refused("recipes", "qzo-llama", says=["unknown name", "expected one of "])
    refused("tune", "nowhere/x.yaml", says=["nowhere/x.yaml: cannot be read (No such file"])
    for text, says in (("steps: [1\n", "line 2"), ("- a\n", "a YAML list"), ("model: !!python/name:os.system x\n", "not valid YAML")):
        (tmp_path / "r.yaml").write_text(text)
        refused("tune", tmp_path / "r.yaml", says=["r.yaml", says])
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    refused("tune", tmp_path / "r.yaml", says="not UTF-8 text")
    (tmp_path / "r.yaml").write_text("")
    refused("tune", tmp_path / "r.yaml", says=["model: given nothing", "data: given nothing", "steps: given nothing"])


GOOD = '{"sentence": "a film .", "label": 1}\n'
LINES = {
    "broken json": (GOOD + '{"sentence": "a', {}, ["train.jsonl line 2", "not valid JSON"]),
    "no object": (GOOD + "[1]\n", {}, ["train.jsonl line 2: a JSON list"]),
    "not UTF-8": (GOOD + '{"sentence": "\udcff", "label": 1}\n', {}, ["train.jsonl line 2", "utf-8"]),
    "unknown field": (GOOD, {"prompt": '"{text} It was"'}, ["train.jsonl line 1", "no field 'text'", "one of its fields: sentence, label"]),
    "field that is missing once": (GOOD + '{"label": 1}\n', {}, ["train.jsonl line 2", "no field 'sentence'"]),
    "label out of range": (GOOD + '{"sentence": "x", "label": 2}\n', {}, ["train.jsonl line 2", "label is 2; expected 0 to 1"]),
    "no label": (GOOD + '{"sentence": "x", "label": -1}\n', {}, ["train.jsonl line 2", "an unlabelled split?"]),
    "label of another text": (GOOD + '{"sentence": "x", "label": "fine"}\n', {}, ["label is 'fine'", "'terrible', 'great'"]),
    "label field": (GOOD, {"label": "gold"}, ["train.jsonl line 1", "no field 'gold'"]),
    "empty split": ("", {}, ["split train", "no examples"]),
    "blank lines only": ("\n\n", {}, ["split train", "no examples"]),
    "same options": (GOOD, {"choices": '[" great", " great"]'}, ["train.jsonl line 1", "cannot tell apart the options ' great' and ' great'"]),
    "empty option": (GOOD, {"choices": '["{sentence}", "{empty}"]'}, ["no field 'empty'"]),
    "long answer": (
        '{"prompt": "p", "completion": "' + "x" * 99 + '"}\n',
        {"prompt": None, "choices": None, "label": None},
        ["train.jsonl line 1", "leaves no token of context", "Raise max_length"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_training_data(case, llama4, tmp_path, refused):
    text, keys, says = LINES[case]
    data = make_data(tmp_path / "data")
    (data / "train.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused("tune", write_recipe(tmp_path / "recipe.yaml", llama4, data, **keys), says=says)
    assert not (tmp_path / "run").exists()


def test_validation_data_is_looked_at_before_the_first_step(llama4, tmp_path, refused):
    data = make_data(tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, data)
    (data / "validation.jsonl").write_text(GOOD * 3 + "{")
    refused("tune", recipe, says=["validation.jsonl line 4", "not valid JSON"])
    (data / "validation.jsonl").write_text("")
    refused("tune", recipe, says=["split validation", "no examples"])
    assert not (tmp_path / "run").exists()


def test_missing_data(recipe, llama4, sentiment, refused):
    refused("tune", recipe, "data=/no/such/folder", says="/no/such/folder: no such file or folder")
    refused("tune", recipe, "data=gone.jsonl", says="gone.jsonl: no such file or folder")
    refused("tune", recipe, "train_split=test", says=["no test.jsonl in it (it holds train.jsonl, validation.jsonl)"])
    refused("tune", recipe, f"data={llama4}", says=["no train.jsonl in it (it holds no .jsonl file)"])


def test_squad_without_answers(llama4, tmp_path, refused):
    (tmp_path / "train.jsonl").write_text(json.dumps({"title": "t", "context": "c", "question": "q?", "answers": {"text": []}}))
    none = dict.fromkeys(("prompt", "choices", "label"))
    refused("tune", write_recipe(tmp_path / "r.yaml", llama4, tmp_path, task="squad", **none), says=["train.jsonl line 1", "answers hold no text"])


EVALUATE = {
    "nothing": ([], ["nothing to evaluate", "--task NAME --data FOLDER, --recipe RECIPE, or --perplexity FILE"]),
    "task without data": (["--task", "sst2"], "nothing to evaluate"),
    "data without task": (["--data", "x"], "nothing to evaluate"),
    "unknown task": (["--task", "sst3", "--data", "x"], "Did you mean sst2?"),
    "two questions": (["--task", "sst2", "--perplexity", "x"], "not allowed with"),
    "limit 0": (["--task", "sst2", "--data", "x", "--limit", "0"], "argument --limit: given 0, expected a positive whole number"),
    "half a window": (["--perplexity", "x", "--window", "1.5"], "argument --window: given 1.5, expected a positive whole number"),
    "missing text": (["--perplexity", "some/text.txt"], "some/text.txt: no such file"),
    "folder for a text": (["--perplexity", "."], ".: no such file"),
    "missing recipe": (["--recipe", "sst3"], "unknown name"),
}


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate(case, llama4, refused):
    arguments, says = EVALUATE[case]
    refused("evaluate", llama4, *arguments, says=says)


def test_perplexity_of_a_text_that_is_too_short(llama4, tmp_path, refused):
    (tmp_path / "text.txt").write_text("one two three")
    refused("evaluate", llama4, "--perplexity", tmp_path / "text.txt", says=["text.txt", "at least one window of 512"])
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe" * 99)
    refused("evaluate", llama4, "--perplexity", tmp_path / "text.txt", says=["text.txt: cannot be read", "a UTF-8 text file"])
