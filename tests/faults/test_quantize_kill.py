"""A quantization that is killed, interrupted or damaged, and started again by the same command, ends in the same bytes."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from children import Child, kill_at
from safetensors.torch import load_file
from tiny_runs import edit_json, make_model

import qzo.model.save
import qzo.quantize
from qzo.cli import main
from qzo.quantize.resume import LayerWriter
from qzo.quantize.walk import Walk

LAYERS = 3
GPTQ = ["--method", "gptq", "--samples", "6", "--max-length", "32"]
SETTINGS = {
    "rtn": ["--method", "rtn", "--asym"],
    "gptq": [*GPTQ, "--bits", "2"],
    "desc_act": [*GPTQ, "--desc-act", "--asym", "--format", "gptq_v2"],
}  # fmt: skip
ALL = SETTINGS | {"zeroqat": ["--method", "zeroqat", "--samples", "6", "--max-length", "32", "--activations", "8"]}
# What the process was doing when it was killed: the function, which call of it, before or after it; the layers kept.
MOMENTS = {
    "in the first layer": (Walk, "_quantize", 2, False, 0),
    "first layer not recorded": (LayerWriter, "_write_progress", 1, False, 0),
    "first layer recorded": (LayerWriter, "_write_progress", 1, True, 1),
    "second shard not whole": (LayerWriter, "flush", 2, True, 1),
    "in the last layer": (LayerWriter, "add", 70, False, 2),
    "all layers done": (LayerWriter, "_write_progress", 3, True, 3),
    "rest copied": (qzo.quantize, "_copy_rest", 1, True, 3),
    "config written": (Path, "write_text", 5, True, 3),
    "shards in one, some removed": (Path, "unlink", 3, True, 0),
    "before the last rename": (Path, "rename", 4, False, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with the 16-bit model and a calibration text. Not to be written to."""
    base = tmp_path_factory.mktemp("source")
    make_model(base / "model", num_hidden_layers=LAYERS)
    (base / "texts.txt").write_text("a great film . It was lovely . " * 200)
    return base


def command(source: Path, out: Path, name: str, *more: str) -> list[str]:
    text = [] if name == "rtn" else ["--calibration", f"{source}/texts.txt"]
    return ["quantize", f"{source}/model", "-o", str(out), "--group-size", "32", "--device", "cpu", *ALL[name], *text, *more]


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, value in load_file(path).items():
            found[name] = value.numpy().tobytes()
    return found


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, Path]:
    """The folders that nothing disturbed."""
    base = tmp_path_factory.mktemp("whole")
    for name in ALL:
        assert main(command(source, base / name, name)) == 0
    return {name: base / name for name in ALL}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "moment"), [*((name, moment) for name in SETTINGS for moment in MOMENTS),
                                              *(("zeroqat", moment) for moment in ("second shard not whole", "all layers done", "rest copied"))])  # fmt: skip
def test_killed_at(name, moment, source, whole, tmp_path):
    *where, kept = MOMENTS[moment]
    arguments = command(source, tmp_path / "out", name)
    code, text = Child(*arguments, before=lambda: kill_at(*where)).wait()
    assert code == -signal.SIGKILL, text
    assert not (tmp_path / "out").exists()
    code, text = Child(*arguments).wait()
    assert code == 0 and "warning" not in text, text
    assert (f"continues after layer {kept} of {LAYERS}" in text) == (kept > 0), text
    assert files(tmp_path / "out") == files(whole[name])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", range(4, 10))
def test_killed_while_the_shards_get_their_names(call, source, whole, tmp_path, monkeypatch):
    """A shard per layer and more for the rest; the first three renames are those of progress.json."""
    monkeypatch.setattr(qzo.model.save, "SHARD_BYTES", 30_000)
    arguments = command(source, tmp_path / "out", "gptq")
    code, text = Child(*arguments, before=lambda: kill_at(Path, "rename", call)).wait()
    assert code == -signal.SIGKILL, text
    code, text = Child(*arguments).wait()
    assert code == 0 and f"continues after layer {LAYERS} of" in text and "warning" not in text, text
    assert tensors(tmp_path / "out") == tensors(whole["gptq"])
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(names) > LAYERS and sorted(set(index["weight_map"].values())) == names
    assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()
    assert index["metadata"]["total_size"] == sum(map(len, tensors(tmp_path / "out").values()))


def test_killed_again_and_again(source, whole, tmp_path):
    arguments = command(source, tmp_path / "out", "desc_act")
    for _ in range(LAYERS):  # the first write of a resumed run confirms the layers that it found
        count = 1 if not (tmp_path / "out.partial").exists() else 2
        code, text = Child(*arguments, before=lambda count=count: kill_at(LayerWriter, "_write_progress", count, True)).wait()
        assert code == -signal.SIGKILL, text
    assert main(arguments) == 0
    assert files(tmp_path / "out") == files(whole["desc_act"])


def after_layer(call: int, do) -> None:
    """From now on `do()` runs after the `call`-th layer of this process is on disk."""
    original, calls = LayerWriter.end_layer, []

    def counted(self, errors):
        original(self, errors)
        calls.append(errors)
        if len(calls) == call:
            do()

    LayerWriter.end_layer = counted


@pytest.mark.parametrize(("name", "number"), [("gptq", signal.SIGTERM), ("gptq", signal.SIGINT), ("zeroqat", signal.SIGTERM)])
def test_signals_stop_and_the_same_command_goes_on(name, number, source, whole, tmp_path):
    arguments = command(source, tmp_path / "out", name)
    code, text = Child(*arguments, before=lambda: after_layer(2, lambda: os.kill(os.getpid(), number))).wait()
    assert code == 128 + number and "Traceback" not in text, text
    assert "out: interrupted. The layers that are done are kept; the same command continues." in text
    code, text = Child(*arguments).wait()
    assert code == 0 and f"continues after layer 2 of {LAYERS}" in text
    assert files(tmp_path / "out") == files(whole[name])


def test_interrupted_before_a_layer_is_done_leaves_nothing(source, tmp_path):
    def interrupt(walk, windows):
        os.kill(os.getpid(), signal.SIGINT)
        return original(walk, windows)

    original = Walk._first_inputs
    code, text = Child(*command(source, tmp_path / "out", "gptq"), before=lambda: setattr(Walk, "_first_inputs", interrupt)).wait()
    assert code == 130 and "interrupted. No layer was done." in text and not list(tmp_path.iterdir())


def test_out_of_memory_in_a_layer_loses_the_others_not(source, whole, tmp_path):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    arguments = command(source, tmp_path / "out", "rtn")
    code, text = Child(*arguments, before=lambda: after_layer(1, fail)).wait()
    assert code == 3 and "the same command continues" in text, text
    code, text = Child(*arguments).wait()
    assert code == 0 and f"continues after layer 1 of {LAYERS}" in text
    assert files(tmp_path / "out") == files(whole["rtn"])


@pytest.fixture(scope="module")
def half(source, tmp_path_factory) -> Path:
    """The parent of out.partial with two layers of gptq. Not to be written to."""
    base = tmp_path_factory.mktemp("half")
    kill = Child(*command(source, base / "out", "gptq"), before=lambda: kill_at(LayerWriter, "_write_progress", 2, True)).wait()
    assert kill[0] == -signal.SIGKILL
    return base


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


FIRST, SECOND = "part-00000.safetensors", "part-00001.safetensors"
DAMAGE = {
    "nothing": (lambda partial: None, 2, ""),
    "truncated shard": (lambda partial: os.truncate(partial / SECOND, 100), 1, "layer 2 is damaged"),
    "empty shard": (lambda partial: os.truncate(partial / FIRST, 0), 0, "layer 1 is damaged"),
    "flipped bit": (lambda partial: flip(partial / SECOND), 1, "layer 2 is damaged"),
    "shard gone": (lambda partial: (partial / FIRST).unlink(), 0, "layer 1 is damaged"),
    "broken progress": (lambda partial: os.truncate(partial / "progress.json", 100), 0, "progress.json: damaged"),
    "progress of another kind": (lambda partial: (partial / "progress.json").write_text("[]"), 0, "progress.json: damaged"),
    "layers of another kind": (lambda partial: edit_json(partial / "progress.json", layers=[{}]), 0, "layer 1 is damaged"),
    "no progress": (lambda partial: (partial / "progress.json").unlink(), 0, ""),
    "other files": (lambda partial: (partial / "part-00002.safetensors").write_bytes(b"half"), 2, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_layers_are_done_again(case, half, source, whole, tmp_path):
    damage, kept, warns = DAMAGE[case]
    damage(shutil.copytree(half / "out.partial", tmp_path / "out.partial"))
    code, text = Child(*command(source, tmp_path / "out", "gptq")).wait()
    assert code == 0 and warns in text and ("warning: " in text) == bool(warns), text
    assert (f"continues after layer {kept} of" in text) == (kept > 0), text
    assert files(tmp_path / "out") == files(whole["gptq"])


OTHER = {
    "bits": (["--bits", "4"], "bits: 2 -> 4"),
    "method": (["--method", "rtn"], "method: gptq -> rtn"),
    "order": (["--desc-act"], "desc_act: False -> True"),
    "samples": (["--samples", "5"], "samples: 6 -> 5"),
    "group": (["--group-size", "64"], "group_size: 32 -> 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_refused_by_name(case, half, source, tmp_path, capsys):
    more, says = OTHER[case]
    partial = shutil.copytree(half / "out.partial", tmp_path / "out.partial")
    before = files(partial)
    assert main(command(source, tmp_path / "out", "gptq", *more)) == 2
    err = capsys.readouterr().err
    assert says in err and "out.partial: begun with other settings" in err and "--restart" in err and err.count("\n") == 1
    assert files(partial) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["model", "texts"])
def test_another_model_or_text_is_refused(what, half, source, tmp_path, capsys):
    shutil.copytree(half / "out.partial", tmp_path / "out.partial")
    changed = shutil.copytree(source, tmp_path / "source")
    if what == "model":
        flip(changed / "model" / "model.safetensors")
    else:
        (changed / "texts.txt").write_text("a dull film . It was awful . " * 200)
    assert main(command(changed, tmp_path / "out", "gptq")) == 2
    assert {"model": "(model: ", "texts": "(calibration: "}[what] in capsys.readouterr().err


def test_restart_discards_what_is_done(half, source, whole, tmp_path):
    shutil.copytree(half / "out.partial", tmp_path / "out.partial")
    code, text = Child(*command(source, tmp_path / "out", "rtn", "--restart")).wait()
    assert code == 0 and "continues" not in text, text
    assert files(tmp_path / "out") == files(whole["rtn"])


@pytest.mark.parametrize("more", [[], ["--restart"]], ids=["continue", "restart"])
def test_two_processes_do_not_write_one_folder(more, source, whole, tmp_path, capsys):
    arguments = command(source, tmp_path / "out", "gptq")
    go, gone = os.pipe()
    first = Child(*arguments, before=lambda: after_layer(1, lambda: os.read(go, 1)))
    while not (tmp_path / "out.partial" / "progress.json").exists() and not first.ended():
        time.sleep(0.001)
    assert main([*arguments, *more]) == 1
    assert "out.partial: another process is writing it" in capsys.readouterr().err
    os.write(gone, b"x")
    code, text = first.wait()
    assert code == 0, text
    assert files(tmp_path / "out") == files(whole["gptq"])


def test_a_refusal_does_not_lock_the_folder(half, source, whole, tmp_path):
    shutil.copytree(half / "out.partial", tmp_path / "out.partial")
    assert main(command(source, tmp_path / "out", "gptq", "--samples", "5")) == 2
    assert main(command(source, tmp_path / "out", "gptq")) == 0
    assert files(tmp_path / "out") == files(whole["gptq"])


def test_killed_at_random_moments(source, whole, tmp_path):
    """From outside, each time a little later than before, until it comes to its end."""
    arguments, draw, kills = command(source, tmp_path / "out", "desc_act"), random.Random(0), 0
    while not (tmp_path / "out").exists():
        child = Child(*arguments)
        time.sleep(draw.uniform(0, 0.05) + 0.04 * kills)
        child.send(signal.SIGKILL)
        code, text = child.wait()
        assert code in (0, -signal.SIGKILL) and "warning" not in text, text
        kills += 1
    assert kills > 2
    assert files(tmp_path / "out") == files(whole["desc_act"])
