"""The command line itself: help that is fast, and what each verb prints."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import write_recipe

from qzo.cli import main
from qzo.estimate import Shapes, Work, estimate
from qzo.model.files import Folder
from qzo.model.gptq_format import read_config
from qzo.recipe import shipped

VERBS = ("quantize", "tune", "evaluate", "export", "replay", "recipes", "doctor")
HEAVY = {"torch", "transformers", "numpy", "safetensors", "pydantic", "yaml", "matplotlib", "tokenizers", "triton"}


def seconds(command: list[str]) -> tuple[float, str]:
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return time.monotonic() - began, result.stdout


def test_help_is_fast():
    command = [str(Path(sys.executable).with_name("qzo")), "--help"]
    text = seconds(command)[1]
    assert all(verb in text for verb in VERBS) and "exit codes: 0 done" in text
    assert any(seconds(command)[0] < 0.5 for _ in range(10)), "the best of ten: other work may keep the machine busy"


def test_help_imports_nothing_heavy():
    code = "import sys, qzo.cli\ntry: qzo.cli.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in seconds([sys.executable, "-c", code])[1].split()}
    assert not loaded & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and f"usage: qzo {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["tunes"], ["tune"], ["export", "x"], ["evaluate", "x", "--device", "tpu"], ["tune", "x", "--drry-run"], ["recipes", "a", "b"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: qzo" in capsys.readouterr().err


def test_module_and_exit_code():
    result = subprocess.run([sys.executable, "-m", "qzo.cli", "recipes", "nothing"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("qzo recipes: recipe: unknown name") and not result.stdout


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [name for name, _ in shipped()] and all(len(line.split()) > 2 for line in lines)
    name = lines[0].split()[0]
    assert main(["recipes", name]) == 0
    assert "\nlr: " in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count(": ok") == 3 and "torch" in out and "device" in out


def test_dry_run_prints_and_writes_nothing(recipe, tmp_path, llama4, capsys):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["tune", recipe, "--dry-run", "seed=7"]) == 0
    out, err = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before and not err
    for text in ("seed: 7", f"run folder: {tmp_path}/run (new)", "4 bits, group 32, gptq", "48 training examples (1 rows",
                 "6 steps, 48 example-forwards, 4 examples at a time", "codes", "scales", "activations", "together", "lower it most"):  # fmt: skip
        assert text in out
    assert main(["tune", recipe]) == 0
    capsys.readouterr()
    assert main(["tune", recipe, "--dry-run"]) == 0
    assert f"run folder: {tmp_path}/run (continues)" in capsys.readouterr().out
    assert main(["tune", recipe, "--dry-run", "--restart", "lr=0.5"]) == 0
    assert f"run folder: {tmp_path}/run (new)" in capsys.readouterr().out


def test_dry_run_with_codes_in_host_memory(llama4, sentiment, tmp_path, monkeypatch, capsys):
    """On a GPU: what crosses the bus in a step of two micro-batches, and two layers' codes there (all of the only layer's, twice)."""
    monkeypatch.setattr("qzo.fit.pick_device", torch.device)
    monkeypatch.setattr("qzo.fit.available", lambda *_: None)
    for module in ("plan", "fit"):
        monkeypatch.setattr(f"qzo.{module}.gigabytes", lambda size: f"{size} bytes")
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, stacked=True, micro_batch=2, device="cuda", dtype="bf16")
    folder = Folder(str(llama4))
    shapes = Shapes.of(folder, read_config(folder))
    codes = sum(map(shapes.code_bytes, shapes.linears))
    assert codes and {linear.layer for linear in shapes.linears} == {0}
    for offload, device in (("none", "cuda"), ("codes", "cpu"), ("codes", "cuda")):
        assert main(["tune", recipe, "--dry-run", f"offload={offload}", f"device={device}"]) == 0
        out = capsys.readouterr().out
        there = (offload, device) == ("codes", "cuda")
        assert (f"codes in host memory: {codes} bytes; {2 * codes} bytes cross the bus in a step" in out) == there == ("bus" in out.split("run folder")[1])
        found = estimate(replace(shapes, streamed=there), Work(2, 16, 2), Work(2, 16, 2), torch.bfloat16, "cuda").phases["load"]["codes"]
        assert found == (2 * codes if there else codes)


def test_tune_shows_progress_and_ends_with_a_table(recipe, tmp_path, capsys):
    assert main(["tune", recipe]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path}/run/report.md\n")
    for row in ("|             | before |", "| accuracy    |", "| peak memory |", "| time        |"):
        assert row in out
    assert "tune 2/6  loss " in err and "tune 6/6" in err and "evaluate at step 0 16/16" in err
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"- command: `qzo tune {recipe}`" in report and "SHA-256" in report and "| lr | 0.01 |" in report
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "journal.bin", "loss.png", "metrics.jsonl", "recipe.yaml", "report.html", "report.md", "snapshots",
    ]  # fmt: skip


def test_a_run_is_repeated_from_its_own_recipe(recipe, tmp_path, capsys):
    from qzo.checkpoint import newest_snapshot

    assert main(["tune", recipe]) == 0
    assert main(["tune", str(tmp_path / "run" / "recipe.yaml"), f"output_dir={tmp_path}/again"]) == 0
    assert newest_snapshot(tmp_path / "run")[2] == newest_snapshot(tmp_path / "again")[2]


def test_default_output_dir(llama4, sentiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "mine.yaml", llama4, sentiment, output_dir=None, steps=1)
    assert main(["tune", "./mine.yaml", "seed=3"]) == 0
    assert (tmp_path / "runs" / "mine-seed3" / "journal.bin").exists()
    assert capsys.readouterr().out.startswith("runs/mine-seed3/report.md")


@pytest.mark.parametrize("kind", ["16-bit", "gptq", "run"])
def test_evaluate_as_json(kind, recipe, llama16, llama4, tmp_path, capsys):
    model = {"16-bit": llama16, "gptq": llama4, "run": tmp_path / "run"}[kind]
    question = ["--recipe", recipe]
    if kind == "run":
        assert main(["tune", recipe]) == 0
        question = []
    capsys.readouterr()
    assert main(["evaluate", str(model), *question, "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"accuracy", "loss", "examples", "truncated"} | ({"steps"} if kind == "run" else set())
    assert figures["examples"] == 16 and 0 <= figures["accuracy"] <= 1
    assert main(["evaluate", str(model), *question, "--limit", "5", "--device", "cpu"]) == 0
    assert "examples: 5" in capsys.readouterr().out


def test_evaluate_a_run_says_what_the_run_said(recipe, tmp_path, capsys):
    from qzo.metrics import read_metrics

    assert main(["tune", recipe]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--device", "cpu"]) == 0
    last = [m["evaluation"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "evaluation" in m][-1]
    assert json.loads(capsys.readouterr().out) == {**last, "steps": 6}


def test_evaluate_a_run_on_other_data_of_its_task(recipe, sentiment, tmp_path, capsys):
    assert main(["tune", recipe]) == 0
    capsys.readouterr()
    for extra in (["--data", str(sentiment)], ["--task", "jsonl", "--data", str(sentiment), "--split", "train"]):
        assert main(["evaluate", str(tmp_path / "run"), "--json", *extra]) == 0
    assert [json.loads(line)["examples"] for line in capsys.readouterr().out.splitlines()] == [16, 48]


def test_perplexity(llama4, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a great film . It was lovely . " * 60)
    arguments = ["--perplexity", str(tmp_path / "text.txt"), "--window", "32", "--limit-windows", "3", "--device", "cpu", "--json"]
    assert main(["evaluate", str(llama4), *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["windows"] == 3 and figures["tokens"] == 93 and figures["perplexity"] > 1


def test_quantize(llama16, tmp_path, capsys):
    calibration = tmp_path / "texts.txt"
    calibration.write_text("a great film . It was lovely . " * 200)
    assert main(["quantize", str(llama16), "-o", str(tmp_path / "rtn"), "--method", "rtn", "--group-size", "32", "--asym"]) == 0
    arguments = ["--bits", "8", "--desc-act", "--format", "gptq_v2", "--calibration", str(calibration), "--samples", "4", "--max-length", "32"]
    assert main(["quantize", str(llama16), "-o", str(tmp_path / "gptq"), *arguments, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.count("linears 7") == 2 and "mean relative error" in out and "quantize 7/7" in err
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["desc_act"], config["checkpoint_format"]) == (8, True, "gptq_v2")
    assert json.loads((tmp_path / "rtn" / "config.json").read_text())["quantization_config"]["sym"] is False


def test_every_public_name_is_there():
    import qzo

    assert all(callable(getattr(qzo, name)) for name in qzo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qzo.nothing  # noqa: B018
