"""Adapters that are exported: peft reads them, and its model computes what ours does."""

import json

import pytest
import torch
from peft import PeftModel
from qzo_kernels.pack import tile_codes
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qzo.errors import BadInput, RunFailed
from qzo.model.gptq_format import LayerTensors
from qzo.model.linear import QuantLinear
from qzo.peft_export import write_peft
from qzo.zo.targets.lora import Lora

MODULES = ("q_proj", "v_proj")
# dtype of the base -> (largest difference of logits over the largest logit). peft multiplies adapters in fp32, ours in the base's dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, dict[str, QuantLinear]]:
    """A tiny Llama twice: its q_proj, k_proj and v_proj quantized, the last in order of activation size; and with their dequantized weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).to(dtype).eval()
    ours = LlamaForCausalLM(config).to(dtype).eval()
    ours.load_state_dict(plain.state_dict())
    layers = {}
    for number, (name, linear) in enumerate(list(plain.named_modules())):
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"):
            rows, cols = linear.weight.shape
            codes = tile_codes(torch.randint(0, 16, (rows, cols), dtype=torch.uint8), 4)
            perm = torch.randperm(cols) if name.endswith("v_proj") else None
            layers[name] = QuantLinear(name, LayerTensors(codes, 0.02 + 0.02 * torch.rand(rows, 2), None, perm), 4, 32, cols)
            linear.weight.data.copy_(layers[name].weight(dtype))
            parent, _, child = name.rpartition(".")
            setattr(ours.get_submodule(parent), child, layers[name])
    return plain, ours, layers


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(36).view(2, 18) % 96, use_cache=False).logits.float()


def make_adapters(layers: dict[str, QuantLinear], r: int = 4, alpha: float = 6.0) -> Lora:
    target = Lora(layers, 7, 0.1, 0.1, r, alpha, modules=MODULES)
    for name, value in target.state().items():
        if ".lora_B" in name:
            value.copy_(0.3 * torch.randn(value.shape))
    return target


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_peft_computes_what_the_adapters_do(dtype, tmp_path):
    plain, ours, layers = make_pair(dtype)
    quiet = logits(ours)
    target = make_adapters(layers)
    folder = write_peft(tmp_path / "adapter", target.state(), "some/base", 4, 6.0, MODULES)
    loaded = PeftModel.from_pretrained(plain, folder)
    expected, given = logits(ours), logits(loaded)
    assert (given - expected).abs().max() < TOLERANCES[dtype] * expected.abs().max()
    assert (quiet - expected).abs().max() > 0.2 * expected.abs().max()
    adapters = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    assert len(adapters) == 8
    for name, value in target.state().items():
        module, part = name.removesuffix("/lora").rsplit(".", 1)
        assert torch.equal(adapters[f"base_model.model.{module}.{part}.default.weight"], value)


def test_the_folder_holds_two_files(tmp_path):
    _, _, layers = make_pair(torch.float32)
    target = make_adapters(layers)
    folder = write_peft(tmp_path / "adapter", target.state(), "some/base", 4, 6.0, MODULES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and (config["r"], config["lora_alpha"]) == (4, 6.0)
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["q_proj", "v_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj.lora_B"
    assert len(tensors) == 8 and torch.equal(tensors[f"base_model.model.{name}.weight"], target.state()[f"{name}/lora"])
    assert all(value.dtype == torch.float32 for value in tensors.values())
    with pytest.raises(BadInput, match="not empty"):
        write_peft(folder, target.state(), "some/base", 4, 6.0, MODULES)


@pytest.mark.parametrize(
    "name,shape",
    [
        ("model.norm.weight/dense", (1, 4)), ("model.q_proj/scales", (4, 4)), ("model.q_proj.lora_A/scales", (4, 64)),
        ("model.q_proj.lora_A/lora", (5, 64)), ("model.k_proj.lora_B/lora", (64, 4)), ("model.q_proj.lora_C/lora", (4, 4)),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_refused(name, shape, tmp_path):
    with pytest.raises(RunFailed, match=f"{name}: shape .*expected lora_A or lora_B of rank 4 of q_proj, v_proj"):
        write_peft(tmp_path / "adapter", {name: torch.zeros(shape)}, "some/base", 4, 6.0, MODULES)
    assert not list(tmp_path.iterdir())
