"""`quantize` by ZeroQAT: the latent checkpoint that it writes, what it refuses, and that an interrupted one goes on to the same tensors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qzo.errors import BadInput, Interrupted, RunFailed
from qzo.model.load import load_model
from qzo.model.qat import load_quantizer_state, prepare_layer, quantize_operands, quantizer_state
from qzo.quantize import inputs, quantize_model

SHORT = {"samples": 12, "max_length": 32, "device": "cpu"}
# family, bits, group_size, activations
CASES = [("llama", 4, None, 4), ("opt", 4, None, 8), ("qwen3", 6, -1, 6), ("llama", 2, 32, None), ("opt", 3, 64, 16), ("qwen3", 8, 64, 16)]


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", 256)


@pytest.mark.parametrize(("family", "bits", "group_size", "activations"), CASES)
def test_reloads_to_the_model_that_was_searched(tiny, calibration, tmp_path, family, bits, group_size, activations):
    source, out, seen = tiny(family), tmp_path / "out", []
    result = quantize_model(str(source), out, "zeroqat", bits, group_size, activations=activations, calibration=calibration,
                            progress=lambda *step: seen.append(step), **SHORT)  # fmt: skip
    low = activations not in (None, 16)
    settings = {"quant_method": "qzo_zeroqat", "version": 1, "bits": bits, "group_size": -1 if group_size is None else group_size,
                "activations": activations or 16, "smoothing": low, "compensation": bits in (2, 3, 4)}  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == settings and config == json.loads((source / "config.json").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    latents = {name for name in before if name.removesuffix(".weight") in load_model(str(out), "cpu", "fp32").fakes}
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - latents)
    assert any(not torch.equal(after[name], before[name]) for name in latents) == (bits in (2, 3, 4))
    added = {name: after[name] for name in after.keys() - before.keys()}
    assert {name.rpartition(".")[2] for name in added} >= {"low", "high"} | ({"span", "scale", "shift"} if low else set())
    assert all(value.dtype == torch.float32 for value in added.values())

    loaded = load_model(str(out), "cpu", "fp32")
    assert loaded.config is None and not loaded.layers and loaded.latent.to_dict() == settings
    assert result["linears"] == len(loaded.fakes) == seen[-1][0] == seen[-1][1] and 0 < result["mean_relative_error"] < 1.2
    assert all(loaded.model.get_submodule(name) is fake for name, fake in loaded.fakes.items())
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    expected.load_state_dict({name: after[name].float() for name in latents}, strict=False)
    quantize_operands(expected)
    layers = expected.get_decoder().layers
    prefix = next(name for name, module in expected.named_modules() if module is layers)
    for index, layer in enumerate(layers):
        prepare_layer(layer, loaded.latent.precision, low)
        names = quantizer_state(layer)
        assert {f"{prefix}.{index}.{name}" for name in names} == {name for name in added if f".{index}." in name}
        load_quantizer_state(layer, {name: added[f"{prefix}.{index}.{name}"] for name in names})
    ids = torch.arange(0, 200, 7)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, expected(ids).logits)


def test_the_grid_is_that_of_the_stored_weights_in_any_dtype(tiny, calibration, tmp_path):
    quantize_model(str(tiny("qwen2")), tmp_path / "out", "zeroqat", activations=4, calibration=calibration, **SHORT)
    wide, narrow = (load_model(str(tmp_path / "out"), "cpu", dtype) for dtype in ("fp32", "bf16"))
    assert narrow.model.lm_head.weight.dtype == torch.bfloat16
    for name, fake in wide.fakes.items():
        other = narrow.fakes[name]
        assert fake.weight.dtype == other.weight.dtype == torch.float16
        assert torch.equal(fake.step, other.step) and torch.equal(fake.zero, other.zero) and torch.equal(fake.offset, other.offset)
    ids = torch.arange(0, 200, 7)[None]
    with torch.no_grad():
        a, b = (loaded.model(ids).logits.float() for loaded in (wide, narrow))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.9


@pytest.mark.parametrize("activations", [4, 16])
def test_an_interrupted_one_goes_on_to_the_same_tensors(tiny, calibration, tmp_path, activations):
    arguments = {"method": "zeroqat", "activations": activations, "calibration": calibration, **SHORT}
    quantize_model(str(tiny("llama")), tmp_path / "whole", **arguments)

    def stop(done: int, total: int, text: str) -> None:
        if done and text.startswith(" "):  # a choice within the second layer
            raise Interrupted("here", 15, "")

    with pytest.raises(Interrupted):
        quantize_model(str(tiny("llama")), tmp_path / "out", progress=stop, **arguments)
    with pytest.raises(BadInput, match=r"begun with other settings \(bits: 4 -> 3\)"):
        quantize_model(str(tiny("llama")), tmp_path / "out", bits=3, **arguments)
    with pytest.raises(BadInput, match="begun with other settings .activations: "):
        quantize_model(str(tiny("llama")), tmp_path / "out", **(arguments | {"activations": 8}))
    lines = []
    quantize_model(str(tiny("llama")), tmp_path / "out", progress=lambda *step: lines.append(step), **arguments)
    assert lines[0] == (7, 14, "continues after layer 1 of 2") and not any(text.startswith("layer 0") for _, _, text in lines)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


REFUSED = {
    "bits": ({"bits": 5}, "bits: 5 with method zeroqat; expected 2, 3, 4, 6, 8"),
    "no quantization": ({"bits": 16}, "bits: 16 with method zeroqat"),
    "activations": ({"activations": 5}, "activations: 5; expected 4, 6, 8, 16"),
    "group": ({"group_size": 0}, "group_size: 0"),
    "odd group": ({"group_size": 48, "activations": 8}, "group_size: 48 with activations of 8 bits; expected a multiple of 32"),
    "no text": ({"calibration": None}, "calibration: none; expected text for method zeroqat"),
    "samples": ({"samples": 0}, "at least 1 window"),
    "order": ({"desc_act": True}, "desc_act: true with method zeroqat"),
    "format": ({"format": "gptq"}, "format: gptq with method zeroqat"),
    "sym": ({"sym": True}, "sym: true with method zeroqat; expected method gptq or rtn"), "asym": ({"sym": False}, "sym: false with method zeroqat"),
    "other method": ({"method": "rtn", "activations": 8}, "activations: 8 with method rtn; expected method zeroqat"),
    "compensation": ({"method": "rtn", "compensation": False}, "compensation: false with method rtn; expected method zeroqat"),
    "six bits": ({"method": "rtn", "bits": 6}, "bits: 6; expected 2, 3, 4 or 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_settings(tiny, calibration, tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        quantize_model(str(tiny("llama")), tmp_path / "out", **({"method": "zeroqat", "calibration": calibration, **SHORT} | settings))
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_latent_checkpoint_and_weights_that_are_not_finite(tiny, calibration, tmp_path):
    source, out = shutil.copytree(tiny("llama"), tmp_path / "model"), tmp_path / "out"
    quantize_model(str(source), tmp_path / "done", "zeroqat", calibration=calibration, **SHORT)
    for method in ("rtn", "zeroqat"):
        with pytest.raises(BadInput, match="already quantized"):
            quantize_model(str(tmp_path / "done"), out, method, calibration=calibration, **SHORT)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] / 0}, source / "model.safetensors")
    with pytest.raises(BadInput, match=f"{name}: infinities or NaN; expected finite weights"):
        quantize_model(str(source), out, "zeroqat", calibration=calibration, **SHORT)
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name] / 0}, source / "model.safetensors")
    with pytest.raises(RunFailed, match="model.layers.0: activations that are not finite"):
        quantize_model(str(source), out, "zeroqat", calibration=calibration, **SHORT)
    assert not out.exists() and not out.with_name("out.partial").exists()
