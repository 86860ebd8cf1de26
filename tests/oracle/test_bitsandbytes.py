"""bitsandbytes' own quantizers as writer and transformers' loading of their folders as reader, on a CPU."""

import json
import shutil

import pytest
import torch
from round_trip import exports_hf, logits, our_logits, tensors_of, tune_and_export, untouched
from tiny_runs import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qzo.cli import main
from qzo.model.load import load_model

INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def base16(tmp_path_factory):
    """A 16-bit folder whose widths, 64 and 128, are whole blocks."""
    return make_model(tmp_path_factory.mktemp("bnb16") / "model", intermediate_size=128)


def write(base, out, dtype=torch.float16, **how):
    """The folder as transformers saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**how), dtype=dtype)
    model.save_pretrained(out)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, out)
    return out


def theirs(folder, dtype=torch.float16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def unpacked(folder):
    """Their model with the weights that they make of it, in fp16."""
    return theirs(folder).dequantize(dtype=torch.float16)


@pytest.fixture(scope="module")
def int8(base16, tmp_path_factory):
    return write(base16, tmp_path_factory.mktemp("int8") / "model", **INT8)


def test_int8_is_read_as_it_is_written(int8, base16):
    ours = our_logits(int8, "fp16")
    assert torch.equal(ours, logits(unpacked(int8)))
    # With their own product, whose activations are of 8 bits too, as near as that is to 16 bits.
    exact = float((ours - logits(AutoModelForCausalLM.from_pretrained(base16, dtype=torch.float16))).abs().max())
    assert 0 < float((ours - logits(theirs(int8))).abs().max()) < exact
    loaded = load_model(str(int8), "cpu", "fp32")
    assert len(loaded.layers) == 7 and all(layer.bits == 8 and layer.zeros is None for layer in loaded.layers.values())
    assert all(tuple(layer.scales.shape) == (layer.out_features, 1) for layer in loaded.layers.values())


def test_int8_is_written_as_it_is_read(int8, sentiment, tmp_path, capsys):
    out = tune_and_export(int8, sentiment, tmp_path, capsys)
    ours = our_logits(out, "fp16")
    assert torch.equal(ours, logits(unpacked(out))) and not torch.equal(ours, our_logits(int8, "fp16"))
    untouched(int8, tmp_path)
    exports_hf(tmp_path)


def test_int8_codes_that_moved(int8, sentiment, tmp_path, capsys):
    from qzo_kernels.pack import untile_codes
    from tiny_runs import write_recipe

    from qzo.rebuild import load_run

    keys = {"method": "quzo", "eps": 0.5, "lr": 200, "steps": 3}
    recipe, run, out = write_recipe(tmp_path / "recipe.yaml", int8, sentiment, **keys), str(tmp_path / "run"), tmp_path / "out"
    assert main(["tune", recipe]) == 0 and main(["export", run, "-o", str(out)]) == 0
    assert "reloaded: logits equal" in capsys.readouterr().out
    before, after = tensors_of(int8), tensors_of(out)
    layers = load_run(run, "cpu", "fp32")[0].layers
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        codes = untile_codes(layer.codes, 8, layer.in_features)
        assert torch.equal(after[f"{name}.weight"].int() + 128, codes.int()) and after[f"{name}.weight"].dtype == torch.int8
    # Theirs knows no -128, which a code may become: it is multiplied as it is.
    torch.testing.assert_close(our_logits(out, "fp16"), logits(unpacked(out)), rtol=0, atol=0)


def test_what_is_left_out_stays_dense(base16, tmp_path):
    folder = write(base16, tmp_path / "model", llm_int8_skip_modules=["q_proj", "lm_head"], **INT8)
    loaded = load_model(str(folder), "cpu", "fp16")
    assert len(loaded.layers) == 6 and torch.equal(logits(loaded.model), logits(unpacked(folder)))


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_biases(tiny, family, tmp_path):
    folder = write(tiny(family), tmp_path / "model", **INT8)
    assert any(name.endswith("proj.bias") for name in tensors_of(folder))
    assert torch.equal(our_logits(folder, "fp16"), logits(unpacked(folder)))


def test_every_scale_is_the_nearest_that_scb_can_say():
    from qzo.model import bnb8_format

    torch.manual_seed(0)
    scales = torch.rand(1 << 16, 1) * 2 ** torch.randint(-20, 4, (1 << 16, 1)) + 1e-9
    seen = bnb8_format.rounded(None, "", scales)
    exact = (seen == scales).float().mean()
    assert 0.98 < float(exact) < 1 and float(((seen - scales) / scales).abs().max()) < 1.2e-7
    assert torch.equal(bnb8_format.rounded(None, "", seen), seen)
