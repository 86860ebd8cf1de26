"""Whole folders: every family and setting reloads to the model of the dequantized weights; refusals; the output folder."""

import json
import shutil

import pytest
import torch
from gptq_reader import weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qzo.quantize
from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.load import load_model, skeleton
from qzo.quantize import quantize_model

# family, method, bits, sym, desc_act, group_size, format: all pairs of the settings that meet in the code
CASES = [
    ("llama", "rtn", 2, True, False, 32, "gptq"),
    ("llama", "gptq", 3, False, True, -1, "gptq_v2"),
    ("llama", "gptq", 4, True, True, 64, "gptq"),
    ("llama", "rtn", 8, False, False, -1, "gptq"),
    ("mistral", "gptq", 2, False, False, -1, "gptq"),
    ("mistral", "rtn", 3, True, False, 64, "gptq"),
    ("mistral", "gptq", 4, False, True, 32, "gptq_v2"),
    ("mistral", "rtn", 8, True, False, 32, "gptq_v2"),
    ("qwen2", "gptq", 2, True, True, 64, "gptq_v2"),
    ("qwen2", "rtn", 3, False, False, 32, "gptq"),
    ("qwen2", "rtn", 4, True, False, -1, "gptq_v2"),
    ("qwen2", "gptq", 8, False, False, 64, "gptq"),
    ("qwen3", "rtn", 2, False, False, 64, "gptq_v2"),
    ("qwen3", "gptq", 3, True, False, 32, "gptq"),
    ("qwen3", "gptq", 4, False, False, -1, "gptq"),
    ("qwen3", "gptq", 8, True, True, 32, "gptq"),
    ("opt", "gptq", 2, False, True, 32, "gptq"),
    ("opt", "gptq", 3, True, False, -1, "gptq_v2"),
    ("opt", "rtn", 4, False, False, 64, "gptq"),
    ("opt", "gptq", 8, True, True, -1, "gptq"),
]
SHORT = {"samples": 12, "max_length": 32}


@pytest.mark.parametrize(("family", "method", "bits", "sym", "desc_act", "group_size", "version"), CASES)
def test_reloads_to_the_dequantized_model(
    tiny, calibration, tmp_path, family, method, bits, sym, desc_act, group_size, version
):  # fmt: skip
    source, out, seen = tiny(family), tmp_path / "out", []
    result = quantize_model(
        str(source), out, method, bits, group_size, sym, desc_act, version, calibration, device="cpu",
        progress=lambda *step: seen.append(step), **SHORT,
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    restored = weights(out, bits, version == "gptq_v2")
    linears = {n for n, m in expected.get_decoder().layers.named_modules(prefix="") if isinstance(m, nn.Linear)}
    assert len(restored) == len(linears) == result["linears"] == seen[-1][0] == seen[-1][1]
    for name, weight in restored.items():
        original = expected.get_submodule(name).weight.data
        assert float((weight - original).norm() / original.norm()) < {2: 1.0, 3: 0.5, 4: 0.3, 8: 0.03}[bits]
        original.copy_(weight)
    loaded = load_model(str(out), "cpu", "fp32")
    assert set(loaded.layers) == set(restored) and loaded.config.desc_act == desc_act
    ids = torch.arange(0, 200, 7)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert result["bytes_after"] < result["bytes_before"] and 0 < result["mean_relative_error"] < 1
    assert json.loads((out / "quantize_config.json").read_text()) == loaded.folder.config["quantization_config"]


def test_everything_else_is_copied_through(tiny, tmp_path):
    source, out = tiny("opt"), tmp_path / "out"
    quantize_model(str(source), out, "rtn", group_size=32)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    kept = before.keys() & after.keys()
    assert {name.rpartition(".")[2] for name in before.keys() - kept} == {"weight"}
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in kept)
    assert any("embed_positions" in name for name in kept) and any("fc1.bias" in name for name in kept)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["bits"] == 4
    assert config == json.loads((source / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_base_model_names_get_the_models_own(tiny, tmp_path):
    source = shutil.copytree(tiny("opt"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, source / "model.safetensors")
    quantize_model(str(source), tmp_path / "a", "rtn", group_size=32)
    quantize_model(str(tiny("opt")), tmp_path / "b", "rtn", group_size=32)
    assert {n: t.tolist() for n, t in load_file(tmp_path / "a" / "model.safetensors").items()} == {
        n: t.tolist() for n, t in load_file(tmp_path / "b" / "model.safetensors").items()
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_never_holds_a_zero_of_0(tiny, tmp_path, calibration, bits):
    source = shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors = {n: t.abs() + 0.01 if "proj" in n else t for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        quantize_model(str(source), out, method, bits, 32, sym=False, calibration=calibration, **SHORT)
        restored = weights(out, bits, v2=False)  # it checks the zeros
        if method == "rtn":
            name = "model.layers.0.self_attn.q_proj"
            original = tensors[f"{name}.weight"].float()
            assert float((restored[name] - original).abs().max()) < 0.51 * float(original.max()) / (2**bits - 2)


def test_same_input_same_bytes(tiny, tmp_path, calibration):
    for name in "ab":
        quantize_model(str(tiny("qwen2")), tmp_path / name, group_size=32, calibration=calibration, **SHORT)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


REFUSED = {
    "method": ({"method": "awq"}, "method: awq; expected gptq, rtn, int8, nf4, fp4"),
    "bits": ({"bits": 5}, "bits: 5; expected 2, 3, 4 or 8"),
    "group": ({"group_size": 0}, "group_size: 0"),
    "format": ({"format": "marlin"}, "format: marlin; expected gptq or gptq_v2"),
    "samples": ({"samples": 0}, "at least 1 window"),
    "no text": ({"calibration": None}, "Give --calibration FILE, or --method rtn"),
    "order": ({"method": "rtn", "desc_act": True}, "desc_act"),
    "short text": ({"samples": 4000}, r"1600 tokens; expected 128000 \(4000 windows of 32\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_settings(tiny, calibration, tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        quantize_model(str(tiny("llama")), tmp_path / "out", **({"calibration": calibration, **SHORT} | settings))
    assert list(tmp_path.iterdir()) == []


def edited(source, folder, **config):
    copy = shutil.copytree(source, folder / "model")
    old = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(old | config))
    return str(copy)


def test_refuses_models(tiny, tmp_path):
    quantize_model(str(tiny("llama")), tmp_path / "done", "rtn")
    with pytest.raises(BadInput, match="already quantized"):
        quantize_model(str(tmp_path / "done"), tmp_path / "out", "rtn")
    with pytest.raises(BadInput, match="it exists and is not empty"):
        quantize_model(str(tiny("llama")), tmp_path / "done", "rtn")
    copy = edited(tiny("llama"), tmp_path, model_type="gpt2")
    with pytest.raises(BadInput, match="model_type 'gpt2'; expected one of llama"):
        quantize_model(copy, tmp_path / "out", "rtn")
    shutil.rmtree(copy)
    copy = edited(tiny("llama"), tmp_path, intermediate_size=128)
    with pytest.raises(BadInput, match=r"gate_proj.weight: shape \[96, 64\]; expected \[128, 64\]"):
        quantize_model(copy, tmp_path / "out", "rtn")
    shutil.rmtree(copy)
    copy = edited(tiny("llama"), tmp_path, num_hidden_layers=3)
    with pytest.raises(BadInput, match="no tensor model.layers.2"):
        quantize_model(copy, tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_refuses_modules_and_sizes_by_name(tiny, monkeypatch):
    folder = Folder(tiny("llama"))
    network = skeleton(folder)
    network.model.layers[1].mlp.router = nn.Embedding(3, 4, device="meta")
    config = qzo.quantize._settings("rtn", 4, 32, True, False, "gptq", None, 1, 2)
    with pytest.raises(BadInput, match="model.layers.1.mlp.router: weights in a Embedding"):
        qzo.quantize._check_model(folder, network, config)
    network.model.layers[1].mlp.router = nn.Linear(40, 32, device="meta")
    config = qzo.quantize._settings("rtn", 3, 32, True, False, "gptq", None, 1, 2)
    with pytest.raises(BadInput, match="router: a weight of 32×40; expected multiples of 32 at 3 bits"):
        qzo.quantize._check_model(folder, network, config)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite_leave_no_folder(tiny, tmp_path, calibration, method):
    source = shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises((BadInput, RunFailed), match="model.layers.1.mlp"):
        quantize_model(str(source), tmp_path / "out", method, calibration=calibration, **SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_what_a_killed_run_left_is_replaced(tiny, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "part-00000.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    quantize_model(str(tiny("llama")), tmp_path / "out", "rtn")
    assert not partial.exists() and not list((tmp_path / "out").glob("part*"))
    load_model(str(tmp_path / "out"), "cpu", "fp32")
