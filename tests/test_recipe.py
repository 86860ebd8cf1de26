"""Recipes: strict values, all problems at once, overrides, round trips."""

import re

import pytest
from pydantic import ValidationError

from qzo import recipe as recipe_module
from qzo.errors import BadInput
from qzo.recipe import Recipe, default_output_dir, diff, load_recipe, run_name, shipped, to_yaml

NEEDED = {"model": "m", "data": "d", "lr": 0.01, "steps": 10}


@pytest.fixture
def write(tmp_path):
    def write(text=""):
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else f"model: m\ndata: d\nlr: 0.01\nsteps: 10\n{text}".encode())
        return path

    return write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, first in (("qzo-opt-4bit", "# OPT-13B on SST-2\n#  more"), ("smoke", "#A laptop's minute"), ("bare", "")):
        (tmp_path / f"{name}.yaml").write_text(f"{first}\nmodel: {name}\ndata: d\nlr: 1e-3\nsteps: 2\n")
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(recipe_module, "_folder", lambda: tmp_path)


def problems(*arguments):
    with pytest.raises(BadInput) as caught:
        load_recipe(*arguments)
    return str(caught.value).split("\n  ")[1:]


def test_defaults(write):
    recipe = load_recipe(write())
    assert recipe == Recipe(**NEEDED)
    assert (recipe.task, recipe.noise, recipe.eps_mode, recipe.eps, recipe.schedule) == (
        "jsonl", "rademacher", "relative", 0.03, "linear",
    )  # fmt: skip
    assert (recipe.max_length, recipe.batch_size, recipe.directions, recipe.train_examples) == (512, 16, 1, 1000)


def test_every_field_is_described_in_one_line():
    for name, field in Recipe.model_fields.items():
        assert field.description and "\n" not in field.description, name


def test_frozen():
    with pytest.raises(ValidationError):
        Recipe(**NEEDED).lr = 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("1.e-3", 1e-3), (".5", 0.5), ("1", 1.0), ("+2.5", 2.5), ("-0.0", 0.0)],
)
def test_numbers_as_people_write_them(write, text, value):
    for recipe in (load_recipe(write(), [f"lr={text}"]), load_recipe(write(f"dense_lr: {text}"), ["lr=5"])):
        assert value in (recipe.lr, recipe.dense_lr)
        assert type(recipe.lr) is float


def test_words_are_not_booleans(write):
    assert load_recipe(write("choices: [yes, no, on, off, y, 1:30, 2024-01-01]\nlabel: no")).choices == [
        "yes", "no", "on", "off", "y", "1:30", "2024-01-01",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("directions: 1.5", "directions: given 1.5, expected a whole number >= 1 and <= 64"),
        ("directions: 2.0", "directions: given 2.0, expected a whole number >= 1 and <= 64"),
        ("directions: abc", 'directions: given "abc", expected a whole number >= 1 and <= 64'),
        ('directions: "2"', 'directions: given "2", expected a whole number >= 1 and <= 64'),
        ("directions: true", "directions: given true, expected a whole number >= 1 and <= 64"),
        ("directions: 65", "directions: given 65, expected a whole number >= 1 and <= 64"),
        ("directions: 0", "directions: given 0, expected a whole number >= 1 and <= 64"),
        ("batch_size: 0", "batch_size: given 0, expected a whole number >= 1"),
        ("max_length: 7", "max_length: given 7, expected a whole number >= 8"),
        ("train_examples: 0", "train_examples: given 0, expected a whole number >= 1 or null"),
        ("seed: -1", f"seed: given -1, expected a whole number >= 0 and <= {2**63 - 1}"),
        (f"seed: {2**63}", f"seed: given {2**63}, expected a whole number >= 0 and <= {2**63 - 1}"),
        ("warmup: -1", "warmup: given -1, expected a whole number >= 0"),
        ("eps: 0", "eps: given 0, expected a finite number > 0"),
        ("eps: 1e-400", "eps: given 0.0, expected a finite number > 0"),
        ("eps: .inf", "eps: given Infinity, expected a finite number > 0"),
        ("eps: .nan", "eps: given NaN, expected a finite number > 0"),
        (f"eps: {'9' * 600}", "eps: given Infinity, expected a finite number > 0"),
        ("eps: nan", 'eps: given "nan", expected a finite number > 0'),
        ("eps: true", "eps: given true, expected a finite number > 0"),
        ("eps:", "eps: given null, expected a finite number > 0"),
        ("dense_lr: -1e-9", "dense_lr: given -1e-09, expected a finite number >= 0 or null"),
        ("clip: 0", "clip: given 0, expected a finite number > 0 or null"),
        ("clip_median: -1", "clip_median: given -1, expected a finite number > 0 or null"),
        ("stacked: yes", 'stacked: given "yes", expected true or false'),
        ("stacked: 1", "stacked: given 1, expected true or false"),
        ("noise: normal", 'noise: given "normal", expected one of rademacher, gaussian'),
        ("method: mezo", 'method: given "mezo", expected one of qzo, quzo, quzo-lora, zeroqat'),
        ("choices: [0, 1]", "choices: given [0, 1], expected a list of texts (numbers in quotes) or null"),
        ("choices: great", 'choices: given "great", expected a list of texts (numbers in quotes) or null'),
        ("task: 3", "task: given 3, expected a text that is not empty"),
        ('task: ""', 'task: given "", expected a text that is not empty'),
        ('task: "\\ud800"', r'task: given "\ud800", expected a text that is not empty'),
        ('task: "a\\0b"', r'task: given "a\u0000b", expected a text that is not empty'),
        ("warmup: 11", "warmup: given 11, expected at most steps, which is 10"),
        ("micro_batch: 17", "micro_batch: given 17, expected at most batch_size, which is 16"),
        ("clip: 1\nclip_median: 2", "clip: given together with clip_median, expected one of the two"),
        ("dense: true\ndense_eps: 1", "dense_lr: given nothing, expected a number, because dense is true"),
        ("dense: true\ndense_lr: 1", "dense_eps: given nothing, expected a number, because dense is true"),
        ("offload: all", 'offload: given "all", expected one of none, embeddings, codes, latents'),
        ("offload: codes", "offload: given codes with stacked: false, expected none, or stacked: true, by which the codes cross the bus once per step"),
        ("offload: codes\ndense: true\ndense_lr: 1\ndense_eps: 1", "offload: given codes with stacked: false, expected none, because dense is true"),
        ("seed: 1\nseed: 2", "seed: given a second time in line 6, expected each key once"),
        ("1: 2", "1: given an unknown key, expected a key of the recipe"),
    ],
)
def test_refuses(write, line, expected):
    found = problems(write(line))
    assert len(found) == 1 and found[0].startswith(expected)
    assert found[0] == expected or expected.endswith("a key of the recipe")


@pytest.mark.parametrize("line", ["warmup: 10", "micro_batch: 16", "directions: 64", "seed: 9223372036854775807",
                                  "clip: 1e-9", "max_length: 8", "dense_lr: 0", "train_examples: null", "choices: []"])  # fmt: skip
def test_edges_are_allowed(write, line):
    key, _, value = line.partition(": ")
    assert recipe_module.show(getattr(load_recipe(write(line)), key)) in (value, f"{value}.0", "1e-09")


def test_codes_are_offloaded_where_signs_are_stacked(write):
    assert load_recipe(write()).offload == "none"
    assert load_recipe(write("offload: codes\nstacked: true")).offload == "codes"


def test_all_problems_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: 3\nlearning_rate: 1\nsteps: 0\nbatch_sise: 4\nstacked: 1\nwarmup: 99\nclip: 1\nclip_median: 1\n"
                    "eps: 1\neps: -2\ndense: true\n")  # fmt: skip
    with pytest.raises(BadInput) as caught:
        load_recipe(path, ["seed=x", "junk", "directions=[", "micro_batch=20"])
    text = str(caught.value)
    assert text.startswith(f"{path}: 16 problems in the recipe\n")
    assert [line.split(":")[0] for line in text.split("\n  ")[1:]] == [
        "eps", "junk", "directions", "model", "learning_rate", "steps", "batch_sise", "stacked", "eps", "seed",
        "data", "lr", "dense_lr", "dense_eps", "clip", "micro_batch",
    ]  # fmt: skip
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [("learning_rate", "lr"), ("bach_size", "batch_size"), ("seeds", "seed"), ("eval_step", "eval_split"),
     ("Steps", "steps"), ("LR", "lr"), ("max_len", "max_length"), ("out_dir", "output_dir"), ("max_steps", "steps")],
)  # fmt: skip
def test_did_you_mean(write, given, meant):
    expected = f"{given}: given an unknown key, expected a key of the recipe (did you mean {meant}?)"
    assert problems(write(), [f"{given}=1"]) == [expected]


def test_overrides(write):
    overrides = ["lr=1e-6", "stacked=true", "choices=[a, no]", "seed=3", "seed=4", "train_examples=null", " steps=7"]
    recipe = load_recipe(write("directions: wrong"), [*overrides, "directions=2"])
    assert (recipe.lr, recipe.stacked, recipe.choices, recipe.seed) == (1e-6, True, ["a", "no"], 4)
    assert (recipe.train_examples, recipe.steps, recipe.directions) == (None, 7, 2)


@pytest.mark.parametrize(
    ("raw", "value"),
    [("{text} It was", "{text} It was"), ("{text}", "{text}"), ("a: b # c", "a: b # c"), ("2024", "2024"), ("x=y", "x=y"),
     ("'{a}\\n'", "{a}\\n"), ('"{a}\\n"', "{a}\n"), ("true", "true"), ("null", None), ("", None), (" a ", " a ")],
)  # fmt: skip
def test_override_of_a_text_is_literal(write, raw, value):
    assert load_recipe(write("prompt: old"), [f"prompt={raw}"]).prompt == value


@pytest.mark.parametrize("override", ["junk", "=3", "", "lr=[1", "lr=&a 1", 'prompt="open', "lr=1\n2: 3: 4"])
def test_override_that_cannot_be_read(write, override):
    found = problems(write(), [override])
    assert len(found) == 1 and "expected a" in found[0]


def test_an_unread_override_is_reported_once(write):
    found = problems(write(b"model: m\ndata: d\nsteps: 1\n"), ["lr=[1"])
    assert len(found) == 1 and found[0].startswith('lr: given "[1", expected a YAML value (')


def test_leading_zeros_are_not_octal(write):
    assert load_recipe(write("seed: 010")).seed == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"model: m\ndata: [1, 2\nlr: 1\n", "my.yaml, line 3: not valid YAML"),
        (b"model: m\n\tdata: d\n", "my.yaml, line 2: not valid YAML"),
        (b"model: m\ndata: \x01\n", "my.yaml, line 2: not valid YAML"),
        (b"model: &m m\ndata: *m\n", "my.yaml, line 1: not valid YAML (anchors"),
        (b"a: 1\nmodel: !!python/object/apply:os.getcwd []\n", "my.yaml, line 2: not valid YAML (anchors, aliases and tags"),
        (b"--- a\n--- b\n", "my.yaml, line 2: not valid YAML"),
        (b"model: " + b"[" * 500, "my.yaml: not valid YAML (nested too deeply)"),
        (b"? [a]\n: b\n", "my.yaml, line 1: not valid YAML"),
        (b"- 1\n- 2\n", "my.yaml: a YAML list"),
        (b"just text", "my.yaml: a YAML str"),
        (b"model: \xff\n", "my.yaml: cannot be read (not UTF-8 text)"),
    ],
    ids=["flow", "tab", "control", "anchor", "tag", "documents", "deep", "odd-key", "list", "text", "bytes"],
)
def test_not_a_recipe_at_all(write, text, expected):
    with pytest.raises(BadInput, match=re.escape(expected)):
        load_recipe(write(text))


def test_an_empty_file_lacks_what_is_needed(write):
    assert [line.split(",")[0] for line in problems(write(b""))] == [f"{key}: given nothing" for key in NEEDED]


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            load_recipe(path)


def test_shipped_names(folder):
    assert shipped() == [("bare", ""), ("qzo-opt-4bit", "OPT-13B on SST-2"), ("smoke", "A laptop's minute")]
    assert load_recipe("smoke", ["steps=3"]).model == "smoke"
    with pytest.raises(BadInput, match=r'unknown name "smokee"; expected one of smoke, .*\./'):
        load_recipe("smokee")
    with pytest.raises(BadInput, match="one of qzo-opt-4bit, "):
        load_recipe("qzo-opt-4bits")
    with pytest.raises(BadInput, match="unknown name"):
        load_recipe("..")


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.output_dir is None and dict(shipped())[name]


def test_names_of_runs():
    assert [run_name(name) for name in ("smoke", "qzo-v1.5", "a/my.run.yaml", "my.yml")] == [
        "smoke", "qzo-v1.5", "my.run", "my",
    ]  # fmt: skip
    assert default_output_dir(Recipe(**NEEDED, seed=3), "smoke") == "runs/smoke-seed3"


def test_built_directly_it_is_checked_as_well():
    with pytest.raises(ValidationError, match="warmup: given 11, expected at most steps"):
        Recipe(**NEEDED, warmup=11)
    for wrong in ({"lr": "0.1"}, {"steps": 2.0}, {"noise": "x"}, {"other": 1}):
        with pytest.raises(ValidationError):
            Recipe(**NEEDED | wrong)


def test_yaml_keeps_the_order_of_the_schema():
    lines = to_yaml(Recipe(**NEEDED)).splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != "-"] == list(Recipe.model_fields)


def test_diff_lines():
    old = Recipe(**NEEDED, prompt="x" * 200).model_dump()
    new = {**old, "lr": 0.02, "prompt": "x" * 199 + "y", "steps": 11, "log_every": 1, "offload": "codes", "added": None}
    del new["noise"]
    lines = diff(old, new)
    assert lines[1:] == ['noise: "rademacher" -> absent', "lr: 0.01 -> 0.02", "steps: 10 -> 11", "added: absent -> null"]
    assert lines[0].startswith('prompt: "xxx')
