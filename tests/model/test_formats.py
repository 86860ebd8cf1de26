"""Every format gives the weights that it says, byte by byte, and is seen by the estimate as it is loaded."""

import json

import pytest
import torch
from tiny_formats import make_4bit, make_awq, make_compressed, make_int8
from transformers import AutoConfig, AutoModelForCausalLM

from qzo.errors import BadInput
from qzo.estimate import Shapes, Work, estimate
from qzo.model.files import Folder
from qzo.model.formats import FORMATS, format_of, read_config
from qzo.model.load import load_model

IDS = torch.arange(1, 25)[None]
# Of the widths 64 and 88 the second ends in a partial group of 24.
CASES = {
    "awq": (make_awq, {}),
    "awq sym": (make_awq, {"sym": True, "size": 16}),
    "awq whole rows": (make_awq, {"size": -1}),
    "compressed 4": (make_compressed, {}),
    "compressed 4 sym": (make_compressed, {"sym": True, "size": 8}),
    "compressed 4 ordered": (make_compressed, {"order": True}),
    "compressed 8 channel": (make_compressed, {"bits": 8, "size": -1}),
    "int8": (make_int8, {"sym": True}),
    "nf4": (make_4bit, {"sym": True}),
    "nf4 nested": (make_4bit, {"sym": True, "nested": 100}),
    "fp4": (make_4bit, {"sym": True, "kind": "fp4", "size": 4}),
    "compressed 8 sym ordered": (make_compressed, {"bits": 8, "sym": True, "order": True}),
}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_weights(case, llama16, tmp_path):
    make, keys = CASES[case]
    folder, dense = make(llama16, tmp_path / "model", **keys)
    loaded = load_model(str(folder), "cpu", "fp32")
    assert len(loaded.layers) == 7
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.weight(torch.float32), dense[f"{name}.weight"])
        assert (layer.zeros is None) == keys.get("sym", False) and (layer.perm is not None) == keys.get("order", False)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama16), dtype=torch.float32).eval()
    expected.load_state_dict(dense)
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-5, atol=1e-4)
    if "order" not in keys:
        assert torch.equal(logits(loaded.model), logits(expected))


@pytest.mark.parametrize("case", CASES)
def test_shapes(case, llama16, tmp_path):
    make, keys = CASES[case]
    folder = Folder(make(llama16, tmp_path / "model", **keys)[0])
    shapes, loaded = Shapes.of(folder, read_config(folder)), load_model(str(folder.path), "cpu", "fp32")
    assert sorted((linear.rows, linear.cols) for linear in shapes.linears) == sorted(
        (layer.out_features, layer.in_features) for layer in loaded.layers.values()
    )
    assert {linear.layer for linear in shapes.linears} == {0} and shapes.quantization.codebook == (make is make_4bit)
    found, layers = estimate(shapes, Work(1, 8, 1), Work(1, 8, 1), torch.float32, "cpu").phases["load"], loaded.layers.values()
    assert found["codes"] == sum(layer.codes.nbytes for layer in layers) and found["scales"] == sum(layer.scales.nbytes for layer in layers)
    assert set(shapes.others) == {name for name, _ in loaded.model.named_parameters() if not name.endswith(".scales")}


def test_many_rows(llama16, tmp_path):
    """More rows than are unpacked at a time, and no multiple of them."""
    from tiny_runs import make_model

    base = make_model(tmp_path / "16", intermediate_size=200)
    for make in (make_awq, make_compressed, make_int8, make_4bit):
        folder, dense = make(base, tmp_path / make.__name__)
        loaded = load_model(str(folder), "cpu", "fp32")
        name = "model.layers.0.mlp.up_proj"
        assert torch.equal(loaded.layers[name].weight(torch.float32), dense[f"{name}.weight"])


def test_every_format_answers():
    """What formats.py asks of a module is there, and no two write under one name."""
    names = [name for layout in FORMATS.values() for name in layout.VERSIONS]
    assert len(set(names)) == len(names) and "hf" not in names
    functions = ("read_config", "shape", "read_layer", "stored_scales", "rounded", "written", "documents")
    for layout in FORMATS.values():
        assert all(callable(getattr(layout, function)) for function in functions)
        assert layout.CODES in layout.PARTS and layout.SCALES in layout.PARTS


def test_the_command_line_names_every_format():
    from qzo.cli import EXPORTS

    assert set(EXPORTS) == {name for layout in FORMATS.values() for name in layout.VERSIONS} | {"hf", "peft", "zeroqat"}


def test_other_spellings_of_awq(llama16, tmp_path):
    folder, _ = make_awq(llama16, tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "quantize_config.json").write_text('{"by": "another tool"}')
    config = read_config(Folder(folder))
    assert FORMATS["awq"].documents(Folder(folder), config, "awq") == (document["quantization_config"], {"quantize_config.json": {"by": "another tool"}})
    assert (config.bits, config.group_size, config.sym) == (4, 32, False) and format_of(config) is FORMATS["awq"]


def test_modules_that_are_not_converted(llama16, tmp_path):
    folder, dense = make_awq(llama16, tmp_path / "model", but="q_proj")
    loaded = load_model(str(folder), "cpu", "fp32")
    assert len(loaded.layers) == 6 and torch.equal(
        loaded.model.get_submodule("model.layers.0.self_attn.q_proj").weight, dense["model.layers.0.self_attn.q_proj.weight"]
    )


def test_gptq_says_no_to_the_others(llama16, tmp_path):
    from qzo.model import gptq_format

    folder, _ = make_awq(llama16, tmp_path / "model")
    with pytest.raises(BadInput, match="format 'awq'"):
        gptq_format.read_config(Folder(folder))
