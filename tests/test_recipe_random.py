"""Properties of recipes that hold for any recipe: nothing is lost on the way through a file, and a diff is exact."""

import json
import random

from qzo import plain_yaml
from qzo.recipe import PIECES, Recipe, diff, load_recipe, to_yaml

TEXTS = ["1e5", "yes", "null", "~", "2024-01-01", "010", "1:30", "{a}: {b}", " leading", "line\nbreak", "# no", "é漢😀",
         "'", '"', "\\", "- a", "true", ".inf", "1_000", "=", "<<", "\t", "a\r\nb", "\x85", "a\u2028b\u2029", "\ufeffx",
         "\u00a0", "x" * 2000]  # fmt: skip


def random_recipe(rng):
    steps, batch_size = rng.randint(1, 10**6), rng.randint(1, 64)
    text = lambda: rng.choice(TEXTS)  # noqa: E731
    number = lambda: 10 ** rng.uniform(-12, 6)  # noqa: E731
    clip = rng.choice([{}, {"clip": number()}, {"clip_median": number()}])
    dense = rng.choice([{}, {"dense": True, "dense_lr": number(), "dense_eps": number()}])
    return Recipe(
        model=text(), data=text(), lr=number(), steps=steps, warmup=rng.randint(0, steps), batch_size=batch_size,
        micro_batch=rng.choice([None, rng.randint(1, batch_size)]), seed=rng.randrange(2**63), eps=number(),
        prompt=rng.choice([None, text()]), choices=rng.choice([None, [text() for _ in range(rng.randint(0, 3))]]),
        label=text(), stacked=(stacked := rng.random() < 0.5), offload="codes" if stacked and steps % 2 else "none", noise=rng.choice(["rademacher", "gaussian"]),
        output_dir=rng.choice([None, text()]), log_every=rng.randint(1, 99), **clip, **dense,
    )  # fmt: skip


def test_random_recipes_survive_yaml_json_and_overrides(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "r.yaml"
    for _ in range(40):
        recipe = random_recipe(rng)
        path.write_bytes(to_yaml(recipe).encode("utf-8"))
        assert load_recipe(path) == recipe
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        line = rng.choice(["steps", "lr", "stacked", "seed", "choices", "eps"])
        value = json.dumps(getattr(recipe, line), ensure_ascii=False)
        assert load_recipe(path, [f"{line}={value}"]) == recipe


def test_diff_of_random_recipes():
    """Exactly the keys that differ and that change results; none in a recipe and itself."""
    rng = random.Random(1)
    free = {"output_dir", "log_every", "save_every", "eval_every", "device_memory", "offload", *PIECES}
    for _ in range(60):
        old, new = random_recipe(rng).model_dump(), random_recipe(rng).model_dump()
        assert diff(old, old) == []
        changed = {key for key in old if old[key] != new[key]} - free
        assert {line.split(":")[0] for line in diff(old, new)} == changed


def test_random_texts_survive_yaml():
    rng = random.Random(2)
    letters = "ab :#-?{}[],&*!|>'\"%@`~\n\t\r\\\x85\u2028\u2029\ufeff\u00a0é😀0123456789.eE+_\x07\x1b\ud7ff\ue000\ufffe"
    for _ in range(1500):
        value = {"a": "".join(rng.choices(letters, k=rng.randint(1, 12))), "b": [rng.choice(TEXTS)]}
        assert plain_yaml.parse(plain_yaml.dump(value)) == (value, [])
