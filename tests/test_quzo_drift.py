"""scripts/quzo_drift: the updates of a run again, with and without feedback."""

import torch
from tiny_runs import write_recipe
from tiny_scripts import script

from qzo.metrics import read_metrics
from qzo.recipe import load_recipe
from qzo.tune import Tuner

drift = script("quzo_drift")


def test_the_run_itself_and_what_rounding_makes_of_it(llama4, sentiment, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, method="quzo", eps=0.5, lr=0.3, stacked=True, steps=8, dtype="fp32")
    Tuner(load_recipe(path), "tiny", "qzo tune").run()
    run = str(tmp_path / "run")
    found = drift.rows(run, "cpu")
    assert [(row["signs"], row["feedback"]) for row in found] == [
        ("of the losses", True), ("of the losses", False), ("random", True), ("random", False), ("none", True),
    ]  # fmt: skip
    itself, plain, random, walk, base = found
    first, *_, last = [m["evaluation"] for m in read_metrics(tmp_path / "run/metrics.jsonl") if "evaluation" in m]
    assert abs(itself["loss"] - last["loss"]) < 1e-5 and abs(base["loss"] - first["loss"]) < 1e-5
    assert base["codes_moved"] == base["walk_rms"] == 0 < itself["walk_rms"] < plain["codes_rms"]
    assert plain["codes_rms"] == plain["walk_rms"] and random["loss"] != itself["loss"] != plain["loss"] != walk["loss"]


def test_random_signs_keep_the_sizes(llama4, sentiment, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, method="quzo", eps=0.5, lr=0.3, stacked=True, steps=40)
    Tuner(load_recipe(path), "tiny", "qzo tune").run()
    records = drift.read_run(str(tmp_path / "run"))[1]
    seen = drift.with_random_signs(records)
    ratio = torch.tensor([float(b.coefs[0] / a.coefs[0]) for a, b in zip(records, seen, strict=True) if a.coefs[0]])
    assert set(ratio.tolist()) == {-1.0, 1.0} and [r.projected for r in seen] == [r.projected for r in records]
