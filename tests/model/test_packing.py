"""Packed Linears against the fake-quantized ones that they are made of: the codes exactly, the logits in a tolerance."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_latent import apart, calibration, latent, logits  # noqa: F401
from tiny_runs import edit_json

from qzo.errors import BadInput
from qzo.latent_export import write_folder
from qzo.model.linear import QuantLinear
from qzo.model.load import load_model
from qzo.model.packing import packed
from qzo.model.qat import FakeQuantLinear

# family, bits, group_size, activations: grouped queries, a LayerNorm with biases, q_norm and k_norm
CASES = [("llama", 4, -1, 4), ("qwen3", 4, -1, 8), ("opt", 6, -1, 6), ("opt", 4, 32, 4), ("qwen2", 2, 32, 16), ("opt", 3, 64, 16), ("llama", 8, 32, 8),
         ("llama", 6, 32, 16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_packed_at_load(latent, case):  # noqa: F811
    fake, light = load_model(str(latent(*case)), "cpu", "fp32"), load_model(str(latent(*case)), "cpu", "fp32", latent_layers=[])
    assert not light.fakes and list(light.layers) == list(fake.fakes)
    assert not any(isinstance(module, FakeQuantLinear) for module in light.model.modules())
    for name, layer in light.layers.items():
        expected, found = packed(fake.fakes[name]).parts(), packed(layer).parts()
        assert expected.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
        assert torch.equal(layer.weight(torch.float32), fake.fakes[name].effective_weight(torch.float32)[0])
        assert layer.scratch is next(iter(light.layers.values())).scratch
    # A token whose channels differ in their last bit may round to a neighbour on a coarse grid.
    difference = apart(logits(light), logits(fake))
    assert difference < (1e-5 if case[3] == 16 else 2e-2)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_one_linear_on_one_input(latent, case):  # noqa: F811
    fake, light = load_model(str(latent(*case)), "cpu", "fp32"), load_model(str(latent(*case)), "cpu", "fp32", latent_layers=[])
    for name, layer in light.layers.items():
        x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(len(name))) * 3 + 0.5
        if layer.shift is not None:
            x = x * layer.divisor + layer.shift
        expected = fake.fakes[name](x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "activations", "smoothing"), [("llama", 4, False), ("opt", 8, False), ("llama", 16, True), ("opt", 16, True)])
def test_smoothing_and_activations_apart(latent, family, activations, smoothing, tmp_path):  # noqa: F811
    """What `quantize` does not write, and the formats can say: packed folders of it compute the same."""
    path = shutil.copytree(latent(family, 4, 32, 4), tmp_path / "model")
    dropped = [ending for ending, gone in ((".span", activations == 16), (".scale", not smoothing), (".shift", not smoothing)) if gone]
    tensors = {name: value for name, value in load_file(path / "model.safetensors").items() if not name.endswith(tuple(dropped))}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "qzo_zeroqat", "version": 1, "bits": 4, "group_size": 32, "activations": activations, "smoothing": smoothing}
    edit_json(path / "config.json", quantization_config=settings)
    fake = load_model(str(path), "cpu", "fp32")
    write_folder(fake, str(tmp_path / "out"), "packed")
    found, light = load_model(str(tmp_path / "out"), "cpu", "fp32"), load_model(str(path), "cpu", "fp32", latent_layers=[])
    assert all((layer.shift is not None) == (smoothing and name.endswith(("down_proj", "fc2"))) for name, layer in found.layers.items())
    assert torch.equal(logits(found), logits(light)) and apart(logits(found), logits(fake)) < (1e-5 if activations == 16 else 2e-2)
    if activations == 16:
        with pytest.raises(BadInput, match="gptq_v2 with smoothing"):
            write_folder(fake, str(tmp_path / "no"), "gptq_v2")


def test_two_stay_latent_and_share_sites_with_packed_ones(latent):  # noqa: F811
    path = latent("llama", 4, -1, 4)
    whole, light = load_model(str(path), "cpu", "fp32"), load_model(str(path), "cpu", "fp32", latent_layers=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in light.fakes} == {"q_proj", "v_proj"} and len(light.layers) == 10
    assert all(isinstance(light.model.get_submodule(name), QuantLinear) for name in light.layers)
    assert apart(logits(light), logits(whole)) < 2e-2
    attention = light.model.model.layers[0].self_attn
    assert attention.q_proj.after.site is light.model.model.layers[0].sites["query_key"]
    # Without latents of their own nothing of the packed ones is left but codes: 10 of 14 Linears.
    floats = {n for n, p in light.model.named_parameters() if p.dim() == 2 and "layers" in n and n.endswith("weight")}
    assert {name.rpartition(".")[0] for name in floats} == set(light.fakes)


def test_names_that_no_linear_has(latent, tiny):  # noqa: F811
    with pytest.raises(BadInput, match="latent_layers: q_porj; expected some of down_proj, gate_proj, k_proj"):
        load_model(str(latent("llama", 4, -1, 4)), "cpu", "fp32", latent_layers=["q_porj"])
    with pytest.raises(BadInput, match="latent_layers: q_proj; expected a latent checkpoint"):
        load_model(str(tiny("llama")), "cpu", "fp32", latent_layers=["q_proj"])
    with pytest.raises(BadInput, match="activations: int8 with a checkpoint that says 4 bits itself"):
        load_model(str(latent("llama", 4, -1, 4)), "cpu", "fp32", activations="int8")
