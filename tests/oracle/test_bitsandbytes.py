"""bitsandbytes' own quantizers as writer and transformers' loading of their folders as reader, on a CPU."""

import json

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from qzo_kernels.pack import untile_codes
from round_trip import exports_hf, logits, our_logits, tensors_of, tune_and_export, untouched
from safetensors.torch import save_file
from tiny_runs import make_model, stop_at, write_recipe
from transformers import AutoModelForCausalLM
from wheels import libraries

from qzo.cli import main
from qzo.errors import Interrupted
from qzo.export import export_run
from qzo.model import bnb8_format
from qzo.model.load import load_model
from qzo.rebuild import load_run
from qzo.recipe import load_recipe
from qzo.tune import Tuner

INT8 = {"load_in_8bit": True}
# dtype of the model; its products are computed in that, as here
FOUR = {
    "nf4": (torch.float16, {"bnb_4bit_quant_type": "nf4"}),
    "nf4 twice": (torch.float16, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": (torch.float16, {"bnb_4bit_quant_type": "fp4"}),
    "fp4 twice bf16": (torch.bfloat16, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    "nf4 stored as bf16": (torch.float16, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}),
}
write = libraries.write_bitsandbytes
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.fixture(scope="module")
def base16(tmp_path_factory):
    """A 16-bit folder whose widths, 64 and 128, are whole blocks."""
    return make_model(tmp_path_factory.mktemp("bnb16") / "model", intermediate_size=128)


def theirs(folder, dtype=torch.float16):
    """Their model. On CPUs with bf16 instructions a forward would round absmax to bf16 for good: it may not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def unpacked(folder):
    """Their model with the weights that they make of it, in fp16: LLM.int8's own product rounds its inputs."""
    return theirs(folder).dequantize(dtype=torch.float16)


@pytest.fixture(scope="module")
def int8(base16, tmp_path_factory):
    return write(base16, tmp_path_factory.mktemp("int8") / "model", **INT8)


def test_int8_is_read_as_it_is_written(int8, base16):
    ours = our_logits(int8, "fp16")
    assert torch.equal(ours, logits(unpacked(int8)))
    # With their own product, whose activations are of 8 bits too, as near as that is to 16 bits.
    exact = float((ours - logits(AutoModelForCausalLM.from_pretrained(base16, dtype=torch.float16))).abs().max())
    rounding = logits(theirs(int8))
    assert 0 < float((ours - rounding).abs().max()) < exact
    assert 0 < float((logits(load_model(str(int8), "cpu", "fp16", activations="int8").model) - rounding).abs().max()) < exact
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


@pytest.fixture(scope="module")
def four(base16, tmp_path_factory):
    """case -> (folder, dtype)."""
    made = {}

    def make(case):
        dtype, how = FOUR[case]
        if case not in made:
            how = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, **how}
            made[case] = write(base16, tmp_path_factory.mktemp("four") / "model", dtype, **how)
        return made[case], dtype

    return make


@pytest.mark.parametrize("case", FOUR)
def test_4_bits_are_read_as_they_are_written(case, four):
    folder, dtype = four(case)
    loaded = load_model(str(folder), "cpu", NAMES[dtype])
    assert len(loaded.layers) == 7 and loaded.config.group_size == 64
    assert all(layer.codebook is not None and layer.zeros is None and layer.bits == 4 for layer in loaded.layers.values())
    assert torch.equal(logits(loaded.model), logits(theirs(folder, dtype)))
    kind = case[:3]
    assert tensors_of(folder)["model.layers.0.mlp.up_proj.weight"].dtype == FOUR[case][1].get("bnb_4bit_quant_storage", torch.uint8)
    assert f"model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__{kind}" in tensors_of(folder)


@pytest.mark.parametrize("case", [case for case in FOUR if "twice" not in case])
def test_4_bits_are_written_as_they_are_read(case, four, sentiment, tmp_path, capsys):
    folder, dtype = four(case)
    out = tune_and_export(folder, sentiment, tmp_path, capsys)
    ours = our_logits(out, NAMES[dtype])
    assert torch.equal(ours, logits(theirs(out, dtype))) and not torch.equal(ours, our_logits(folder, NAMES[dtype]))
    untouched(folder, tmp_path)
    exports_hf(tmp_path)


@pytest.mark.parametrize("case", [case for case in FOUR if "twice" in case])
def test_double_quantization_is_undone_by_an_export(case, four, sentiment, tmp_path, capsys):
    folder, dtype = four(case)
    recipe, run, out = write_recipe(tmp_path / "recipe.yaml", folder, sentiment, steps=3, lr=0.05), str(tmp_path / "run"), tmp_path / "out"
    assert main(["tune", recipe]) == 0 and main(["replay", run, "--verify"]) == 0 and main(["export", run, "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert "reloaded: logits equal; rounding scales to fp32 moves a scale by at most 0 of itself" in printed.out
    assert "its absmax is quantized twice (bnb_4bit_use_double_quant); the export holds the tuned one in fp32, 0.38 bits more" in printed.err
    assert torch.equal(our_logits(out, NAMES[dtype]), logits(theirs(out, dtype)))
    with pytest.warns(UserWarning, match="quantized twice"):
        export_run(run, str(tmp_path / "untouched"), to=0)
    # Nothing has moved: other bytes, the same model.
    assert torch.equal(logits(theirs(tmp_path / "untouched", dtype)), logits(theirs(folder, dtype)))
    before, after = tensors_of(folder), tensors_of(out)
    assert {name for name in before if "nested" not in name} == set(after) and any("nested" in name for name in before)
    assert all(value.dtype == torch.float32 for name, value in after.items() if name.endswith(".absmax"))
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, out)]
    assert configs[1] == {**configs[0], "bnb_4bit_use_double_quant": False} and configs[0]["bnb_4bit_use_double_quant"]
    exports_hf(tmp_path)


def test_a_run_that_was_stopped_goes_on(four, sentiment, tmp_path):
    for name in ("whole", "stopped"):
        path = write_recipe(tmp_path / f"{name}.yaml", four("nf4 twice")[0], sentiment, output_dir=tmp_path / name)
        recipe = load_recipe(path, [])
        if name == "stopped":
            with pytest.raises(Interrupted):
                stop_at(Tuner(recipe, name, ""), 5).run()
        Tuner(recipe, name, "").run()
    whole, stopped = (load_run(str(tmp_path / name), "cpu", "fp32")[0].layers for name in ("whole", "stopped"))
    assert whole and all(torch.equal(layer.scales, stopped[name].scales) for name, layer in whole.items())


def test_adapters_beside_4_bits(four, sentiment, tmp_path, capsys):
    keys = {"method": "quzo-lora", "eps": 0.1, "lr": 0.1}
    recipe, run, out = write_recipe(tmp_path / "recipe.yaml", four("nf4")[0], sentiment, **keys), tmp_path / "run", tmp_path / "out"
    assert main(["tune", recipe]) == 0 and main(["export", str(run), "-o", str(out)]) == 0
    assert "adapters for peft, 6 steps applied; read again: the run's tensors" in capsys.readouterr().out
    assert not torch.equal(logits(load_run(str(run), "cpu", "fp32")[0].model), our_logits(four("nf4")[0], "fp32"))


@pytest.mark.parametrize("block, twice", [(32, False), (32, True), (128, False)])
def test_other_block_sizes(block, twice, base16, tmp_path):
    """Which the library has and transformers does not offer: the tensors of its functions in a folder of theirs. With 32, absmax of the
    widest Linears takes more than one block of the second quantization."""
    base = make_model(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_use_double_quant": twice}
    folder = write(base, tmp_path / "model", **how)
    tensors, plain = tensors_of(folder), tensors_of(base)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed, state = quantize_4bit(plain[name], blocksize=block, compress_statistics=twice, quant_type="nf4")
        tensors |= {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors")
    loaded = load_model(str(folder), "cpu", "fp16")
    assert loaded.config.group_size == block and torch.equal(logits(loaded.model), logits(theirs(folder)))
    if twice:
        assert len(tensors["model.layers.0.mlp.up_proj.weight.nested_absmax"]) == 4


def test_a_quantized_head(base16, tmp_path):
    how = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16, "llm_int8_skip_modules": []}
    folder = write(base16, tmp_path / "model", **how)
    loaded = load_model(str(folder), "cpu", "fp16")
    assert "lm_head" in loaded.layers and torch.equal(logits(loaded.model), logits(theirs(folder)))


def test_every_scale_is_the_nearest_that_scb_can_say():
    torch.manual_seed(0)
    scales = torch.rand(1 << 16, 1) * 2 ** torch.randint(-20, 4, (1 << 16, 1)) + 1e-9
    seen = bnb8_format.rounded(None, "", scales)
    exact = (seen == scales).float().mean()
    assert 0.98 < float(exact) < 1 and float(((seen - scales) / scales).abs().max()) < 1.2e-7
    assert torch.equal(bnb8_format.rounded(None, "", seen), seen)
