import json
import sys

import pytest

from qzo.data.tasks import Example, get_task, load_examples
from qzo.errors import BadInput


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = {
    "sst2": (
        {"sentence": " a fine film . ", "label": 1},
        Example("a fine film . It was", (" terrible", " great"), 1),
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        Example('It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n', ("Yes", "No"), 0),
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "label": 2},
        Example('Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 2),
    ),
    "boolq": (
        {"passage": "Rain -- Rain is wet.", "question": "is rain wet", "label": 1},
        Example("Rain -- Rain is wet. Is rain wet?\n", ("No", "Yes"), 1),
    ),
    "copa": (
        {"premise": "It rained. ", "choice1": "I wept.", "choice2": "The Sun set.", "question": "effect", "label": 0},
        Example("It rained so", (" I wept.", " the Sun set."), 0),
    ),
    "wic": (
        {"word": "place", "sentence1": "My place.", "sentence2": "No place.", "label": 0},
        Example(
            'Does the word "place" have the same meaning in these two sentences? Yes, No?\nMy place.\nNo place.\n',
            ("No", "Yes"),
            0,
        ),
    ),
    "squad": (
        {"title": "Rain", "context": "It is wet.", "question": " What? ", "answers": {"text": ["wet", "very wet"]}},
        Example(
            "Title: Rain\nContext: It is wet.\nQuestion: What?\nAnswer:", (" wet\n",), 0, ("wet", "very wet")
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt(name):
    record, expected = CASES[name]
    assert get_task(name).make(record) == expected
    assert get_task(name).generation == (name == "squad")


def test_prompt_variants():
    copa = {"premise": "It rained", "choice1": "Clouds came.", "choice2": "x", "question": "cause", "label": 1}
    assert get_task("copa").make(copa) == Example("It rained because", (" clouds came.", " x"), 1)
    boolq = {"passage": "P", "question": "why?", "answer": True}
    assert get_task("boolq").make(boolq) == Example("P Why?\n", ("No", "Yes"), 1)


@pytest.mark.parametrize(
    "name, folder, sizes",
    [
        ("sst2", "sst2", (67349, 872)),
        ("rte", "rte", (2490, 277)),
        ("cb", "cb", (250, 56)),
        ("boolq", "boolq_devsplit", (2000, 1270)),
        ("copa", "copa", (400, 100)),
        ("wic", "wic", (5428, 638)),
        ("squad", "squad_devsplit", (2000, 500)),
    ],
)
def test_shared_data(shared, name, folder, sizes):
    task = get_task(name)
    for split, size in zip(("train", "validation"), sizes, strict=True):
        examples = load_examples(task, shared / "data" / folder, split)
        assert len(examples) == size
        assert {e.label for e in examples} == set(range(len(examples[0].options)))
        assert all(e.prompt and all(e.options) for e in examples)
        assert all(e.references for e in examples) == task.generation


def test_limit_takes_one_fixed_subset_of_train_and_the_first_of_others(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", *({"sentence": str(i), "label": i % 2} for i in range(20)))
    numbers = {
        (split, limit): [int(e.prompt.split()[0]) for e in load_examples(get_task("sst2"), tmp_path, split, limit)]
        for split in ("train", "validation")
        for limit in (5, 8, None)
    }
    assert numbers["validation", 5] == [0, 1, 2, 3, 4]
    assert numbers["train", None] == list(range(20))
    assert numbers["train", 8] == [17, 3, 1, 13, 18, 10, 5, 16]  # frozen
    assert numbers["train", 8][:5] == numbers["train", 5]


def test_source_names_file_and_line(tmp_path):
    path = write(tmp_path / "x.jsonl", {"sentence": "a", "label": 0}, {"sentence": "b", "label": 1})
    assert [e.source for e in load_examples(get_task("sst2"), path, "train")] == [f"{path} line 1", f"{path} line 2"]


def test_jsonl_choices(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"q": "1+1", "a": "2", "b": "3", "gold": 0},
        {"q": "1+2", "a": "2", "b": "3", "gold": "3"},
        {"q": "{q}", "a": 0.5, "b": 7, "gold": "0.5"},
    )
    task = get_task("jsonl", prompt="{{{q}}} =", choices=[" {a}", " {b}"], label="gold")
    assert not task.generation
    assert load_examples(task, path, "train") == [
        Example("{1+1} =", (" 2", " 3"), 0),
        Example("{1+2} =", (" 2", " 3"), 1),
        Example("{{q}} =", (" 0.5", " 7"), 0),
    ]


@pytest.mark.parametrize(
    "settings, record",
    [
        ({}, {"prompt": "Hi", "completion": " there "}),
        ({"completion": "answer"}, {"prompt": "Hi", "answer": " there "}),
        ({"prompt": "{who}", "completion": " {answer} "}, {"who": "Hi", "answer": "there"}),
    ],
)
def test_jsonl_completion(settings, record):
    task = get_task("jsonl", **settings)
    assert task.generation
    assert task.make(record) == Example("Hi", (" there ",), 0, ("there",))


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a", "a}", "{a.__class__}"])
@pytest.mark.parametrize("where", ["prompt", "completion", "choices"])
def test_templates_take_only_plain_fields(where, template):
    settings = {"choices": [template, "x"]} if where == "choices" else {where: template}
    with pytest.raises(BadInput, match=f"task jsonl, {where}: .*plain field names|task jsonl, {where}: .*template"):
        get_task("jsonl", **settings)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "sst"}, "Did you mean sst2"),
        ({"name": "sst2", "prompt": "x"}, "prompt set"),
        ({"name": "jsonl", "prompt": "x", "choices": ["a", "b"], "completion": "y"}, "both choices and completion"),
        ({"name": "jsonl", "prompt": "x", "label": "y"}, "label without choices"),
        ({"name": "jsonl", "prompt": "x", "choices": ["a"]}, "at least two"),
        ({"name": "jsonl", "prompt": "x", "choices": "ab"}, "a list"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(BadInput, match=message):
        get_task(**arguments)


GOOD = '{"sentence": "a", "label": 0}\n'


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"sentence": "a", "label": 0', "not valid JSON"),
        ("[1, 2]", "a JSON list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"sentence": "a", "label": -1}', "unlabelled"),
        ('{"sentence": "a", "label": null}', "unlabelled"),
        ('{"sentence": "a", "label": 2}', "label is 2"),
        ('{"sentence": "a", "label": 0.0}', "label is 0.0"),
        ('{"sentence": "a"}', "no field 'label'.*its fields: sentence"),
        ('{"text": "a", "label": 0}', "no field 'sentence'.*its fields: text, label"),
        ('{"sentence": ["a"], "label": 0}', "field 'sentence' is list"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(BadInput, match=f"train.jsonl line 3.*{message}"):
        load_examples(get_task("sst2"), tmp_path, "train")


def test_bad_bytes_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD.encode() + b'{"sentence": "\xff", "label": 0}\n')
    with pytest.raises(BadInput, match="train.jsonl line 2: not valid JSON.*utf-8"):
        load_examples(get_task("sst2"), tmp_path, "train")


def test_bad_answers():
    task = get_task("squad")
    record = {"title": "t", "context": "c", "question": "q", "answers": {"text": []}}
    with pytest.raises(ValueError, match="answers hold no text"):
        task.make(record)


def test_unknown_field_of_a_template(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(BadInput, match="x.jsonl line 1 .*no field 'quest'.*question, answer"):
        load_examples(get_task("jsonl", prompt="{quest}", completion="answer"), path, "train")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_split(tmp_path, content):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(BadInput, match="split train: no examples"):
        load_examples(get_task("sst2"), tmp_path, "train")


def test_missing_split_and_file(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(BadInput, match="no validation.jsonl in it .it holds train.jsonl"):
        load_examples(get_task("sst2"), tmp_path, "validation")
    with pytest.raises(BadInput, match="no such file or folder"):
        load_examples(get_task("sst2"), tmp_path / "absent.jsonl", "train")


def test_hub_id_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"stanfordnlp/sst2: .*`datasets`.*qzo\[hub\]"):
        load_examples(get_task("sst2"), "stanfordnlp/sst2", "train")


def test_hub_id_with_config(monkeypatch):
    class Datasets:
        class exceptions:
            DatasetsError = RuntimeError

        @staticmethod
        def load_dataset(path, config, split):
            if split != "validation":
                raise ValueError(f"Unknown split {split}")
            return [{"sentence": f"{path} {config}", "label": 1}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    example = load_examples(get_task("sst2"), "nyu-mll/glue:sst2", "validation")[0]
    assert (example.prompt, example.source) == ("nyu-mll/glue sst2 It was", "nyu-mll/glue:sst2 validation row 0")
    with pytest.raises(BadInput, match="split tests cannot be read .Unknown split"):
        load_examples(get_task("sst2"), "nyu-mll/glue:sst2", "tests")
