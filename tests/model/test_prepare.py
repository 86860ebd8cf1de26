"""qzo.prepare: the layers of a model that the user holds, and what it says of models without any."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qzo
from qzo.errors import BadInput
from qzo.model import prepare
from qzo.model.linear import QuantLinear


def theirs(kind):
    """What a class of another library looks like from here: a Linear of another name."""
    return type(kind, (nn.Linear,), {"__module__": "hqq.core.quantize"})(8, 8)


@pytest.fixture
def model(llama4):
    return qzo.load_model(str(llama4), "cpu", "fp32").model


def test_a_loaded_model_gives_its_layers_and_a_step_moves_them(model):
    layers = qzo.prepare(model)
    assert list(layers) == [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] and len(layers) == 7
    assert not model.training and not model.config.use_cache and not any(p.requires_grad for p in model.parameters())
    ids = torch.arange(12).view(2, 6)
    optimizer = qzo.ZO([qzo.Scales(layers, eps=0.03, lr=0.1)])
    before = {name: layer.scales.clone() for name, layer in layers.items()}
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    assert all(not torch.equal(before[name], layer.scales) for name, layer in layers.items())


def test_layers_keep_their_noise_in_a_wrapper(model):
    """Another prefix of the names would be another direction."""
    ids = torch.arange(12).view(2, 6)
    losses = [qzo.ZO([qzo.Scales(qzo.prepare(held), 0.03, 0.1)]).losses(lambda: model(input_ids=ids, labels=ids).loss, 3, [(0, 1)])
              for held in (model, nn.ModuleDict({"module": model}))]  # fmt: skip
    assert torch.equal(*losses)


def test_a_model_that_is_not_quantized(llama16):
    model = AutoModelForCausalLM.from_pretrained(llama16)
    with pytest.raises(BadInput, match="8 Linears, none of them quantized.*gptq, awq, compressed-tensors.*qzo quantize"):
        qzo.prepare(model)


def test_layers_of_another_library_are_named():
    model = nn.Sequential(nn.Linear(8, 8), theirs("HQQLinear"))
    with pytest.raises(BadInput, match=r"another library \(hqq.HQQLinear\).*expected layers of gptq, awq.*bitsandbytes.Linear4bit"):
        qzo.prepare(model)


def test_layers_that_transformers_quantized_as_plain_linears():
    model = nn.Sequential(nn.Linear(8, 8))
    model.is_quantized, model.quantization_method = True, "compressed-tensors"
    with pytest.raises(BadInput, match=r"another library \(compressed-tensors\).*qzo.load_model\(FOLDER\)"):
        qzo.prepare(model)


def test_layers_that_can_be_converted_are_replaced(model, monkeypatch):
    """The seam for other formats: a class by name, and a function of its modules."""

    class Theirs(nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.ours = [ours]

    name = "model.layers.0.mlp.down_proj"
    ours = model.get_submodule(name)
    model.set_submodule(name, Theirs(ours))
    assert name not in qzo.prepare(model)
    monkeypatch.setitem(prepare.CONVERT, f"{__name__}.Theirs", lambda where, module, scratch: module.ours[0] if where == name else None)
    assert qzo.prepare(model)[name] is ours is model.get_submodule(name)


def test_what_is_no_model_and_scales_that_were_cast(llama4):
    loaded = qzo.load_model(str(llama4), "cpu", "fp32")
    with pytest.raises(BadInput, match="prepare: LoadedModel.*give its .model"):
        qzo.prepare(loaded)
    with pytest.raises(BadInput, match=r"q_proj.scales: torch.float16.*instead of casting"):
        qzo.prepare(loaded.model.half())


def test_what_is_not_prepared_is_refused_by_name(model):
    layers = qzo.prepare(model)
    linear = theirs("Linear4bit")
    for wrong, said in (({}, "an empty dict"), (model, "LlamaForCausalLM"), ({"x": linear}, "Linear4bit x"), ({**layers, "y": nn.Linear(2, 2)}, "Linear y")):
        with pytest.raises(ValueError, match=rf"Scales: given {said}; expected QuantLinears.*qzo.prepare\(model\)"):
            qzo.Scales(wrong, 0.1, 0.1)
    for wrong, said in (([], "an empty list"), (model, "LlamaForCausalLM"), (layers, "dict"), ([linear], "Linear4bit"), (model.parameters(), "generator")):
        with pytest.raises(ValueError, match=rf"ZO: given {said}; expected a list of targets.*qzo.prepare\(model\)"):
            qzo.ZO(wrong)
