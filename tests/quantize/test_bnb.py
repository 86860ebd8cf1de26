"""`qzo quantize --method int8 | nf4 | fp4`: the folder that transformers saves with bitsandbytes, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qzo.cli import main
from qzo.errors import BadInput
from qzo.model.load import load_model
from qzo.quantize import quantize_model

IDS = torch.arange(1, 25)[None]
HOW = {"int8": {"load_in_8bit": True}} | {kind: {"load_in_4bit": True, "bnb_4bit_quant_type": kind} for kind in ("nf4", "fp4")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "model", intermediate_size=128, num_hidden_layers=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", HOW)
def test_the_folder_is_theirs(method, dtype, base, tmp_path):
    """Every tensor, byte for byte; the config, but for the modules that are left out and the dtype of products, which it names."""
    source, theirs, out = tmp_path / "model", tmp_path / "theirs", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(source)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=BitsAndBytesConfig(**HOW[method])).save_pretrained(theirs)
    summary = quantize_model(str(source), out, method, device="cpu")
    assert summary["linears"] == 14 and 0 < summary["mean_relative_error"] < (0.02 if method == "int8" else 0.15)
    written, expected = (load_file(folder / "model.safetensors") for folder in (out, theirs))
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {name: (t.dtype, t.shape) for name, t in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in written.items())
    ours, config = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (out, theirs))
    named = {"llm_int8_skip_modules": ["lm_head"]}
    if method != "int8":
        named["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    assert ours == {**config, **named} and not (out / "quantize_config.json").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("method", HOW)
def test_every_reader_has_the_same_weights(method, family, tiny, tmp_path):
    """Of a model whose head is tied, or that has Linears outside of its layers, which stay as they are."""
    out = tmp_path / "out"
    quantize_model(str(tiny(family)), out, method, group_size=-1 if method == "int8" else 32)
    loaded, model = load_model(str(out), "cpu", "fp16"), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16).eval()
    theirs = model.dequantize(dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, theirs(IDS).logits)
    assert len(loaded.layers) == {"llama": 14, "qwen3": 14, "opt": 12}[family]


def test_goes_on_after_the_last_layer(base, tmp_path):
    def stop(done, total, text):
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(base), tmp_path / "out", "nf4", progress=stop)
    seen = []
    quantize_model(str(base), tmp_path / "out", "nf4", progress=lambda *step: seen.append(step))
    quantize_model(str(base), tmp_path / "whole", "nf4")
    assert seen[0][2] == "continues after layer 1 of 2"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_quantize_tune_export(base, sentiment, tmp_path, capsys):
    from tiny_runs import write_recipe

    model, out = tmp_path / "nf4", tmp_path / "out"
    shutil.copytree(base, tmp_path / "base")
    assert main(["quantize", str(tmp_path / "base"), "-o", str(model), "--method", "nf4"]) == 0
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", model, sentiment)]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(out)]) == 0
    assert "out: bitsandbytes-4bit, 6 steps applied" in capsys.readouterr().out


REFUSED = {
    "bits": ({"bits": 8}, "bits: 8 with method nf4; expected 4"),
    "int8 bits": ({"method": "int8", "bits": 4}, "bits: 4 with method int8; expected 8"),
    "block": ({"group_size": -1}, "group_size: -1 with method nf4; expected 32 or 64 or"),
    "int8 group": ({"method": "int8", "group_size": 64}, "group_size: 64 with method int8; expected -1"),
    "sym": ({"sym": False}, "sym: false with method nf4; expected method gptq or rtn"),
    "order": ({"desc_act": True}, "desc_act: true with method nf4"),
    "format": ({"format": "gptq"}, "format: gptq with method nf4"),
    "crossing": ({"group_size": 128}, "q_proj: rows of 64; expected whole blocks of 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, base, tmp_path):
    settings, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        quantize_model(str(base), tmp_path / "out", **{"method": "nf4"} | settings)
    assert list(tmp_path.iterdir()) == []


def test_without_the_library(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["quantize", str(base), "-o", str(tmp_path / "out"), "--method", "nf4"]) == 2
    said = capsys.readouterr().err
    assert "method: nf4, and no bitsandbytes (" in said and "pip install 'qzo[bitsandbytes]', or use method gptq or rtn" in said


def test_infinite_weights_leave_no_folder(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match="model.layers.1.mlp.up_proj.weight: infinities or NaN"):
        quantize_model(str(source), tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
