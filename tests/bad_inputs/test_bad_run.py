"""Runs and output folders that cannot be used."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import write_recipe

from qzo.cli import main


@pytest.fixture(scope="module")
def finished(llama4, sentiment, tmp_path_factory):
    """A finished run of three steps, of a model folder of its own. Not to be written to."""
    base = tmp_path_factory.mktemp("finished")
    model = shutil.copytree(llama4, base / "model")
    assert main(["tune", write_recipe(base / "recipe.yaml", model, sentiment, steps=3)]) == 0
    return base


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_output_dir_is_a_file(recipe, refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    for extra in ([], ["--restart"], ["--dry-run"]):
        refused("tune", recipe, *extra, says=["/run: a file; expected a folder for the run", "another output_dir"])
    refused("tune", recipe, f"output_dir={tmp_path}/run/below", says=["/run/below: cannot be written in", "Choose another output_dir"])
    assert (tmp_path / "run").read_text() == "mine"


def test_output_dir_holds_something_else(recipe, refused, tmp_path):
    """The recipe's own folder, for one: the run would write its recipe.yaml over the user's."""
    before = files(tmp_path)
    for extra in ([], ["--restart"]):
        refused("tune", recipe, f"output_dir={tmp_path}", *extra, says=["recipe.yaml and no journal.bin", "another output_dir"])
    assert files(tmp_path) == before


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_out_exists(verb, finished, llama16, tmp_path, refused):
    source = {"quantize": [llama16, "--method", "rtn"], "export": [finished / "run"]}[verb]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        refused(verb, *source, "-o", tmp_path / name, says=[f"/{name}: it exists and is not empty; expected a new folder"])
    assert files(tmp_path) == {path.relative_to(tmp_path): b"mine" for path in (tmp_path / "full" / "mine", tmp_path / "file")}


def read_only(tmp_path):
    """A folder in which nothing can be made, even by root."""
    if os.geteuid() == 0:
        return "/proc"
    (tmp_path / "read-only").mkdir(mode=0o500)
    return tmp_path / "read-only"


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_read_only_out(verb, finished, llama16, tmp_path, refused):
    source = {"quantize": [llama16, "--method", "rtn"], "export": [finished / "run"]}[verb]
    refused(verb, *source, "-o", f"{read_only(tmp_path)}/out", says=["/out: cannot be created", "a folder that can be written"])


def test_read_only_output_dir(recipe, tmp_path, refused):
    refused("tune", recipe, f"output_dir={read_only(tmp_path)}/run", says=["/run: cannot be ", "a folder that can be"])


def test_what_is_no_run(llama4, refused, tmp_path):
    for verb in (["export"], ["replay"]):
        out = ["-o", tmp_path / "out"]
        refused(*verb, llama4, *out, says=["no journal.bin; expected the folder of a run", "`qzo tune` prints it"])
        refused(*verb, tmp_path / "nowhere", *out, says="nowhere: no journal.bin")
    assert not list(tmp_path.iterdir())


def test_damaged_journal(finished, refused, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    data = (run / "journal.bin").read_bytes()
    (run / "journal.bin").write_bytes(b"x" + data[1:])
    refused("replay", run, says=["journal.bin: not a journal"], code=1)
    (run / "journal.bin").write_bytes(data[:40] + b"x" + data[41:])
    refused("export", run, "-o", tmp_path / "out", says=["journal.bin: the header is damaged"], code=1)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("step", ["-1", "4"])
def test_step_out_of_range(step, finished, refused, tmp_path):
    for extra in ([], ["--verify"], ["-o", tmp_path / "out"]):
        refused("replay", finished / "run", "--to", step, *extra, says=[f"--to: {step}; expected 0 to 3"])
    assert not list(tmp_path.iterdir())


def test_nothing_to_verify_against(finished, refused):
    refused("replay", finished / "run", "--to", "2", "--verify", says="no snapshot to compare with", code=1)


def test_verify_finds_a_difference(finished, refused, tmp_path):
    """A snapshot that is whole and not what the journal says."""
    from qzo.checkpoint import newest_snapshot, write_snapshot

    run = shutil.copytree(finished / "run", tmp_path / "run")
    step, state, meta = newest_snapshot(run)
    next(iter(state.values()))[0, 0] += 1e-3
    write_snapshot(run, step, state, meta)
    refused("replay", run, "--verify", says=["step 3: the replayed state differs from the snapshot"], code=1)


def test_base_model_changed(finished, refused, tmp_path, monkeypatch):
    base = shutil.copytree(finished, tmp_path / "base")
    journal = (base / "run" / "journal.bin").read_bytes()
    weights = finished / "model" / "model.safetensors"
    old = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    try:
        save_file(tensors, weights)
        says = ["weights with SHA-256", "on which the run was made", "Give the folder that the run was tuned from"]
        refused("replay", base / "run", says=says)
        refused("export", base / "run", "-o", tmp_path / "out", says=says)
        refused("evaluate", base / "run", says=says)
        refused("tune", finished / "recipe.yaml", says=says)
    finally:
        weights.write_bytes(old)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert (base / "run" / "journal.bin").read_bytes() == journal


def test_training_data_changed(llama4, sentiment, refused, tmp_path):
    """A run never goes on, unnoticed, with other examples than it began with."""
    data = shutil.copytree(sentiment, tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4, data, steps=2)
    assert main(["tune", recipe]) == 0
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)))
    before = files(tmp_path / "run")
    refused("tune", recipe, says=["split train: other examples than the run began with", "--restart to start over"])
    assert files(tmp_path / "run") == before
    (data / "train.jsonl").write_text("".join(lines))
    assert main(["tune", recipe]) == 0


def test_going_on_elsewhere_is_said(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qzo.run.device_name", lambda device: "NVIDIA H200")
    assert main(["tune", recipe]) == 0
    monkeypatch.undo()
    assert main(["tune", recipe]) == 0
    assert "warning: the run began on NVIDIA H200" in capsys.readouterr().err


def test_base_model_gone(finished, refused, tmp_path):
    away = (finished / "model").rename(finished / "elsewhere")
    try:
        refused("export", finished / "run", "-o", tmp_path / "out", says=["/model: no such file or folder"])
        refused("evaluate", finished / "run", says=["/model: no such file or folder"])
    finally:
        away.rename(finished / "model")


def test_tuned_scale_beyond_half_precision(finished, refused, tmp_path):
    from qzo.checkpoint import newest_snapshot, write_snapshot

    run = shutil.copytree(finished / "run", tmp_path / "run")
    step, state, meta = newest_snapshot(run)
    next(iter(state.values()))[0, 0] = 1e6
    write_snapshot(run, step, state, meta)
    refused("export", run, "-o", tmp_path / "out", says=["beyond the range of torch.float16", "lower lr"], code=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_version_1_cannot_hold_a_zero_of_0(llama4_copy, sentiment, tmp_path, refused, capsys):
    """The lane that holds z - 1 = -1 in version 1 is read as 0 or as 16, depending on the reader."""
    config = json.loads((llama4_copy / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (llama4_copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama4_copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.qzeros"
    tensors[name] = torch.full_like(tensors[name], 0x08888880)
    save_file(tensors, llama4_copy / "model.safetensors")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4_copy, sentiment, steps=1)]) == 0
    says = [f"{name}: a zero point of 0 in format gptq (v1)", "Use --format gptq_v2"]
    refused("export", tmp_path / "run", "-o", tmp_path / "out", "--format", "gptq", says=says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "gptq_v2" in capsys.readouterr().out


def test_another_process_writes_the_run(finished, refused, tmp_path):
    from qzo.journal import Journal

    recipe = str(finished / "recipe.yaml")
    with Journal.open(finished / "run" / "journal.bin"):
        refused("tune", recipe, says="another process is writing", code=1)
        refused("tune", recipe, "--restart", says="another process is writing this run", code=1)
    assert not (finished / "run.old1").exists()
