"""Folders of other formats than GPTQ that cannot be tuned: refused by the name of the tensor or key."""

import json

import pytest
import torch
from test_bad_model import cut, drop, put
from tiny_formats import make_4bit, make_awq, make_compressed, make_int8
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


def said(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def state(**keys):
    """Set keys in the JSON of one Linear of a 4-bit bitsandbytes folder."""
    return lambda folder: put(STATE, lambda t: said({**json.loads(bytes(t.tolist())), **keys}))(folder)


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
    "4 bits": (bnb(load_in_4bit=True, load_in_8bit=False), ["a quantization config and no quantized tensor"]),
}
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
NF4 = {
    "codes": (cut(f"{Q}.weight"), [f"{Q}.weight: 2047 bytes; expected 2048, for 64×64 codes of 4 bits"]),
    "no codes": (drop(f"{Q}.weight"), [f"no tensor {Q}.weight"]),
    "scales": (cut(f"{Q}.weight.absmax"), [f"{Q}.weight.absmax: torch.float32 of shape [511]; expected torch.float32 of shape [512]"]),
    "no scales": (drop(f"{Q}.weight.absmax"), [f"no tensor {Q}.weight.absmax"]),
    "nan": (put(f"{Q}.weight.absmax", lambda t: t * float("nan")), [f"{Q}.weight.absmax: infinities or NaN"]),
    "bytes": (put(f"{Q}.weight.absmax", torch.Tensor.byte), [f"{Q}.weight.absmax: torch.uint8 of shape [512]; expected torch.float32"]),
    "no levels": (drop(f"{Q}.weight.quant_map"), [f"no tensor {Q}.weight.quant_map"]),
    "other levels": (put(f"{Q}.weight.quant_map", lambda t: t + 0.01), [f"{Q}.weight.quant_map: other levels than those of nf4"]),
    "few levels": (cut(f"{Q}.weight.quant_map"), [f"{Q}.weight.quant_map: torch.float32 of shape [15]; expected torch.float32 of shape [16]"]),
    "no state": (drop(STATE), [f"{Q}: no quant_state of nf4 or fp4; expected one tensor", "incomplete"]),
    "cut state": (put(STATE, lambda t: t[:-4]), [f"{STATE}: cannot be read (", "expected JSON", "damaged"]),
    "nested state": (put(STATE, lambda t: torch.full((3000,), ord("["), dtype=torch.uint8)), [f"{STATE}: cannot be read (", "expected JSON"]),
    "no text": (put(STATE, lambda t: t | 128), [f"{STATE}: cannot be read (", "expected JSON"]),
    "a list": (put(STATE, lambda t: said([])), [f"{STATE}: list; expected a JSON object"]),
    "numbers": (put(STATE, torch.Tensor.float), [f"{STATE}: torch.float32 of", "expected the bytes of a short JSON text"]),
    "long": (put(STATE, lambda t: t.repeat(100)), [f"{STATE}: torch.uint8 of", "expected the bytes of a short JSON text"]),
    "other kind": (state(quant_type="fp4"), [f"{STATE}: quant_type 'fp4'; expected 'nf4'"]),
    "unknown kind": (state(quant_type="int4"), [f"{STATE}: quant_type 'int4'; expected 'nf4'"]),
    "no block": (state(blocksize=0), [f"{STATE}: blocksize 0; expected a positive whole number"]),
    "crossing": (state(blocksize=24), [f"{STATE}: blocksize 24 with rows of 64: blocks that cross rows"]),
    "other block": (state(blocksize=16), [f"{STATE}: blocksize 16; expected 8, as other Linears have it"]),
    "other shape": (state(shape=[64, 32]), [f"{STATE}: shape [64, 32]; expected [64, 64], as config.json says"]),
    "no shape": (state(shape=None), [f"{STATE}: shape None; expected two positive whole numbers"]),
    "8 bits": (bnb(load_in_4bit=False, load_in_8bit=True), ["a quantization config and no quantized tensor"]),
}
CASES = {make_awq: AWQ, make_compressed: COMPRESSED, make_int8: INT8, make_4bit: NF4}
NESTED = {
    "no outer": (drop(f"{Q}.weight.nested_absmax"), f"{Q}.weight.absmax: torch.uint8 of shape [512]; expected torch.float32"),
    "outer": (cut(f"{Q}.weight.nested_absmax"), f"{Q}.weight.nested_absmax: torch.float32 of shape [5]; expected torch.float32 of shape [6]"),
    "levels": (cut(f"{Q}.weight.nested_quant_map"), f"{Q}.weight.nested_quant_map: torch.float32 of shape [255]; expected torch.float32 of shape [256]"),
    "no levels": (drop(f"{Q}.weight.nested_quant_map"), f"no tensor {Q}.weight.nested_quant_map"),
    "block": (state(nested_blocksize="256"), f"{STATE}: nested_blocksize '256'; expected a positive whole number"),
    "offset": (state(nested_offset=None), f"{STATE}: nested_offset None; expected a number"),
    "infinite": (state(nested_offset=float("inf")), f"{STATE}: nested_offset inf; expected a number"),
    "vast": (state(nested_offset=10**400), f"{STATE}: nested_offset 1000"),
    "vast block": (state(nested_blocksize=10**15), f"{Q}.weight.nested_absmax: torch.float32 of shape [6]; expected torch.float32 of shape [1]"),
}


@pytest.mark.parametrize("case", NESTED)
def test_double_quantization(case, llama16, sentiment, tmp_path, refused):
    folder, _ = make_4bit(llama16, tmp_path / "model", nested=100)
    NESTED[case][0](folder)
    refused("tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment), says=NESTED[case][1])


@pytest.mark.parametrize("keys, says", [
    ({"method": "quzo", "lr": 0.1}, "recipe, method: quzo with NF4, FP4 or AQLM weights, whose codes name entries of a table"),
    ({"activations": "int8"}, "recipe, activations: int8 with NF4, FP4 or AQLM weights, whose codes name entries of a table"),
])  # fmt: skip
def test_what_needs_a_uniform_grid(keys, says, llama16, sentiment, tmp_path, refused):
    folder, _ = make_4bit(llama16, tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, sentiment, **keys)
    for more in ((), ("--dry-run",)):
        refused("tune", recipe, *more, says=says)
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("make, own", [(make_awq, "awq"), (make_compressed, "compressed-tensors"), (make_int8, "bitsandbytes-8bit"), (make_4bit, "bitsandbytes-4bit")])
def test_exports_as_itself_only(make, own, llama16, sentiment, tmp_path, refused):
    from qzo.cli import main

    folder, _ = make(llama16, tmp_path / "model")
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", folder, sentiment, steps=1)]) == 0
    says = [f"--format: gptq; expected one of {own}, hf", "kept in the layout that they have"]
    refused("export", tmp_path / "run", "-o", tmp_path / "out", "--format", "gptq", says=says)
    assert not (tmp_path / "out").exists()
