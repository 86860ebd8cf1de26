"""Folders of random weights: they load, know nothing, have the statistics that were asked for, and are written in bounded shards."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from qzo_kernels import reference
from safetensors.torch import load_file
from tiny_scripts import script as load_script

import qzo.model.save
from qzo.model.files import Folder
from qzo.model.load import load_model, skeleton
from qzo.quantize import quantize_model

TEXT = "the film is good, the acting is bad and nobody knows what any of it was about. " * 6
KINDS = {"bf16": [], "4 bits": ["--bits", "4"], "3 bits": ["--bits", "3"], "2 bits": ["--bits", "2"], "latent": ["--latent", "2"]}
SIXTEEN = ("bf16", "latent")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_random_model")


@pytest.fixture
def make(script, monkeypatch):
    """make(folder, *arguments) runs the script; returns its exit code."""

    def run(folder: Path, *arguments: object, like: str = "tiny") -> int:
        monkeypatch.setattr(sys, "argv", ["make_random_model", "--like", like, "-o", str(folder), *map(str, arguments)])
        return script.main()

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_knows_nothing(kind, make, tmp_path, capsys):
    assert make(tmp_path / "model", *KINDS[kind]) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "model") in out and "write 21/21" in err
    loaded = load_model(str(tmp_path / "model"), "cpu", "fp32")
    assert len(loaded.layers) == (0 if kind in SIXTEEN else 14) and (loaded.config is None) == (kind in SIXTEEN)
    assert len(loaded.fakes) == (14 if kind == "latent" else 0)
    ids = torch.tensor([loaded.tokenizer()(TEXT)["input_ids"][:200]])
    with torch.no_grad():
        result = loaded.model(ids, labels=ids)
    assert bool(torch.isfinite(result.logits).all()) and 0.05 < float(result.logits.std()) < 0.5
    assert abs(float(result.loss) - math.log(1024)) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_spread_of_the_weights(kind, make, tmp_path):
    assert make(tmp_path / "model", *KINDS[kind], "--seed", "3") == 0
    if kind in SIXTEEN:
        found = {n.removesuffix(".weight"): t.float() for n, t in load_file(tmp_path / "model" / "model.safetensors").items() if n.endswith("proj.weight")}
    else:
        found = {name: reference.dequantize(layer.codes, layer.scales.data, None, int(kind[0]), 32, layer.in_features, torch.float32)
                 for name, layer in load_model(str(tmp_path / "model"), "cpu", "fp32").layers.items()}  # fmt: skip
    assert len(found) == 14
    for name, weight in found.items():
        expected = 0.02 / 2 if name.endswith(("o_proj", "down_proj")) else 0.02
        assert float(weight.std()) == pytest.approx(expected, rel=0.08) and abs(float(weight.mean())) < expected / 10, name
    assert not torch.equal(found["model.layers.0.self_attn.q_proj"], found["model.layers.1.self_attn.q_proj"])


def test_quantized_folder_is_as_quantize_writes_it(make, tmp_path):
    """Names, shapes and types of the tensors, and what the JSON files say."""
    assert make(tmp_path / "16") == 0
    quantize_model(str(tmp_path / "16"), tmp_path / "quantized", "rtn", 4, 32, device="cpu")
    assert make(tmp_path / "random", "--bits", 4) == 0
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "random"))
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    same = [name for name in found if name.endswith(("qzeros", "g_idx"))]
    assert len(same) == 28 and all(torch.equal(found[name], expected[name]) for name in same)
    for name in ("config.json", "quantize_config.json"):
        assert json.loads((tmp_path / "random" / name).read_text()) == json.loads((tmp_path / "quantized" / name).read_text())
    assert sorted(p.name for p in (tmp_path / "random").iterdir()) == sorted(p.name for p in (tmp_path / "quantized").iterdir())


def test_latent_folder_is_as_quantize_writes_it(make, tmp_path):
    """Names, shapes and types of the tensors, and what config.json says of them."""
    assert make(tmp_path / "16") == 0
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(4)))
    quantize_model(str(tmp_path / "16"), tmp_path / "quantized", "zeroqat", 2, 32, activations=16, calibration=str(texts), samples=4, max_length=32,
                   device="cpu", compensation=False)  # fmt: skip
    assert make(tmp_path / "random", "--latent", 2) == 0
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "random"))
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    says = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("quantized", "random")]
    assert says[0] == says[1]


@pytest.mark.parametrize("kind", ["bf16", "3 bits"])
def test_shards_are_bounded_and_indexed(kind, make, tmp_path, monkeypatch):
    assert make(tmp_path / "one", *KINDS[kind]) == 0
    monkeypatch.setattr(qzo.model.save, "SHARD_BYTES", 150_000)
    assert make(tmp_path / "many", *KINDS[kind]) == 0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in found), "the seed decides, not the shards"
    sizes = {path.name: path.stat().st_size for path in files}
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) and size < 170_000 for name, size in sizes.items()), sizes
    load_model(str(tmp_path / "many"), "cpu", "fp32")


@pytest.mark.parametrize("like", ["llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b"])
def test_shapes_are_those_of_the_model(like, script, tmp_path):
    """Against transformers' own modules for the same config, without the weights."""
    config = script.model_config(like, 2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(Folder("builtin:tiny-llama").path / "model.safetensors", tmp_path)
    model = skeleton(Folder(tmp_path))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: shape for n, shape, _ in script.shapes(config)}
    assert model.config.rope_parameters["rope_theta"] == (500000.0 if like == "llama-3-8b" else 10000.0)
    whole = sum(math.prod(shape) for _, shape, _ in script.shapes(script.model_config(like, None)))
    assert whole == {"llama-2-7b": 6738415616, "llama-2-13b": 13015864320, "llama-2-70b": 68976648192, "llama-3-8b": 8030261248}[like]


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_needed_is_what_it_takes(kind, make, script, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(script, "check_space", lambda out, size: seen.append(size))
    assert make(tmp_path / "model", *KINDS[kind]) == 0
    assert 0 <= seen[0] - sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < script.SMALL
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000_000}))
    assert make(tmp_path / "large" / "model", *KINDS[kind], like="llama-2-70b") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"make_random_model: {tmp_path}/large/model: 5.00 GB free on its disk; expected ") and not (tmp_path / "large").exists()


def test_layers(make, tmp_path):
    assert make(tmp_path / "model", "--layers", 1) == 0
    folder = Folder(tmp_path / "model")
    assert folder.config["num_hidden_layers"] == 1 and not any("layers.1." in name for name in folder.tensors)
    load_model(str(folder.path), "cpu", "fp32")


WRONG = {
    "too many layers": (["--layers", 3], "--layers: 3; expected 1 to 2"),
    "no layer": (["--layers", 0], "--layers: 0; expected 1 to 2"),
    "group": (["--bits", 4, "--group-size", 0], "--group-size: 0; expected a positive whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, make, tmp_path, capsys):
    arguments, says = WRONG[case]
    assert make(tmp_path / "model", *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


def test_refuses_a_folder_that_holds_something(make, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert make(tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"make_random_model: {tmp_path}: it exists and is not empty") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_help(make, capsys):
    for arguments, code in ((["--help"], 0), (["--bits", "5"], 2)):
        with pytest.raises(SystemExit) as stop:
            make(Path("x"), *arguments)
        assert stop.value.code == code
    assert "--like" in capsys.readouterr().out
