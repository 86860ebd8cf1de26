"""Folders of other formats than GPTQ that cannot be tuned: refused by the name of the tensor or key."""

import json

import pytest
import torch
from test_bad_model import cut, drop, put
from tiny_formats import make_awq, make_compressed, make_int8
from tiny_runs import edit_json, write_recipe

Q = "model.layers.0.self_attn.q_proj"


def weights(**keys):
    """Set keys of the weights in a compressed-tensors config."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_0"]["weights"].update(keys)
        edit_json(folder / "config.json", quantization_config=config)

    return change


def bnb(**keys):
    """Set keys of a bitsandbytes config."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={**config, **keys})

    return change


AWQ = {
    "codes": (cut(f"{Q}.qweight"), [f"{Q}.qweight: shape [63, 8]; expected [64, 8]", "do not fit these weights"]),
    "zeros": (cut(f"{Q}.qzeros"), [f"{Q}.qzeros: shape [1, 8]; expected [2, 8]"]),
    "no zeros": (drop(f"{Q}.qzeros"), [f"no tensor {Q}.qzeros"]),
    "nan": (put(f"{Q}.scales", lambda t: t * float("nan")), [f"{Q}.scales: infinities or NaN"]),
    "dtype": (put(f"{Q}.qweight", torch.Tensor.long), [f"{Q}.qweight: torch.int64; expected int32"]),
}
COMPRESSED = {
    "codes": (cut(f"{Q}.weight_packed"), [f"{Q}.weight_packed: shape [63, 8]; expected [64, 8]"]),
    "other bits": (weights(num_bits=8), [f"{Q}.weight_zero_point: shape [8, 2]; expected [16, 2]", "do not fit these weights"]),
    "other size": (weights(group_size=64), [f"{Q}.weight_scale: shape [64, 2]; expected [64, 1]"]),
    "channel": (weights(strategy="channel"), [f"{Q}.weight_scale: shape [64, 2]; expected [64, 1]"]),
    "symmetric": (weights(symmetric=True), [f"{Q}.weight_zero_point: zero points in a symmetric checkpoint", "symmetric: false"]),
    "no zeros": (drop(f"{Q}.weight_zero_point"), [f"no tensor {Q}.weight_zero_point"]),
    "no shape": (drop(f"{Q}.weight_shape"), [f"no tensor {Q}.weight_shape"]),
    "other shape": (put(f"{Q}.weight_shape", lambda t: t + 1), [f"{Q}.weight_shape: [65, 65]; expected [64, 64], as config.json says"]),
    "infinite": (put(f"{Q}.weight_scale", lambda t: t / 0), [f"{Q}.weight_scale: infinities or NaN"]),
    "integer scales": (put(f"{Q}.weight_scale", torch.Tensor.int), [f"{Q}.weight_scale: torch.int32; expected int32, and floating-point"]),
}


INT8 = {
    "codes": (cut(f"{Q}.weight"), [f"{Q}.weight: torch.int8 of shape [63, 64]; expected torch.int8 of shape [64, 64]"]),
    "no codes": (drop(f"{Q}.weight"), [f"no tensor {Q}.weight"]),
    "16 bits": (put(f"{Q}.weight", torch.Tensor.half), [f"{Q}.weight: torch.float16 of shape", "expected torch.int8"]),
    "scales": (cut(f"{Q}.SCB"), [f"{Q}.SCB: torch.float32 of shape [63]; expected torch.float32 of shape [64]"]),
    "no scales": (drop(f"{Q}.SCB"), [f"no tensor {Q}.SCB"]),
    "codes alone": (drop(f"{Q}.SCB", f"{Q}.weight_format"), [f"{Q}.weight: torch.int8, and no scales; expected floating-point", "incomplete"]),
    "infinite": (put(f"{Q}.SCB", lambda t: t / 0), [f"{Q}.SCB: infinities or NaN"]),
    "half scales": (put(f"{Q}.SCB", torch.Tensor.half), [f"{Q}.SCB: torch.float16 of shape [64]; expected torch.float32"]),
    "tiles": (put(f"{Q}.weight_format", lambda t: t + 2), [f"{Q}.weight_format: 2, weights in the order of one GPU; expected 0"]),
    "neither": (bnb(load_in_8bit=False), ["bitsandbytes with neither load_in_8bit nor load_in_4bit; expected one of the two"]),
    "both": (bnb(load_in_4bit=True), ["bitsandbytes with load_in_8bit and load_in_4bit; expected one of the two"]),
    "4 bits": (bnb(load_in_4bit=True, load_in_8bit=False), ["bitsandbytes with load_in_4bit; expected load_in_8bit"]),
}
CASES = {make_awq: AWQ, make_compressed: COMPRESSED, make_int8: INT8}


@pytest.mark.parametrize("make, case", [(make, case) for make, cases in CASES.items() for case in cases])
def test_folder(make, case, llama16, sentiment, tmp_path, refused):
    folder, _ = make(llama16, tmp_path / "model")
    damage, says = CASES[make][case]
    damage(folder)
    refused("tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment), says=says)
    assert not (tmp_path / "run").exists()


def test_uneven_groups(llama16, sentiment, tmp_path, refused):
    folder, _ = make_compressed(llama16, tmp_path / "model", order=True)
    put(f"{Q}.weight_g_idx", torch.zeros_like)(folder)
    refused("tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment), says=f"{Q}.weight_g_idx: groups of unequal size")


@pytest.mark.parametrize("make", CASES)
def test_is_not_quantized_again(make, llama16, tmp_path, refused):
    folder, _ = make(llama16, tmp_path / "model")
    refused("quantize", folder, "-o", tmp_path / "out", "--method", "rtn", says="already quantized; expected a 16-bit model")


@pytest.mark.parametrize("make, own", [(make_awq, "awq"), (make_compressed, "compressed-tensors"), (make_int8, "bitsandbytes-8bit")])
def test_exports_as_itself_only(make, own, llama16, sentiment, tmp_path, refused):
    from qzo.cli import main

    folder, _ = make(llama16, tmp_path / "model")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment, steps=1)]) == 0
    says = [f"--format: gptq; expected one of {own}, hf", "kept in the layout that they have"]
    refused("export", tmp_path / "run", "-o", tmp_path / "out", "--format", "gptq", says=says)
    assert not (tmp_path / "out").exists()
