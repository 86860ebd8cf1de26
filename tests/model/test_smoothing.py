"""Smoothing is exact: with quantization off, random s and δ everywhere leave the logits as they are. A fold that is wrong does not."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qzo.errors import BadInput
from qzo.model.decoder import decode, is_plain
from qzo.model.qat import FakeQuantLinear, FoldedNorm, Precision, prepare_layer, refresh_layer
from qzo.model.smoothing import Channels, places

OFF = Precision(bits=16, group_size=-1, activations=16)
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
ROTARY = SIZES | {"intermediate_size": 44, "num_key_value_heads": 2, "head_dim": 12}
OPT = SIZES | {"ffn_dim": 44, "word_embed_proj_dim": 32}
MODELS = {
    "MHA, rotary, RMSNorm": ("llama", ROTARY | {"num_key_value_heads": 4}),
    "GQA, rotary, RMSNorm": ("llama", ROTARY),
    "GQA, biases": ("llama", ROTARY | {"attention_bias": True, "mlp_bias": True}),
    "one key head": ("mistral", ROTARY | {"num_key_value_heads": 1}),
    "biases of q, k, v": ("qwen2", {k: v for k, v in ROTARY.items() if k != "head_dim"}),
    "norms of q and k": ("qwen3", ROTARY),
    "MHA, LayerNorm, no rotary": ("opt", OPT),
    "LayerNorm after attention": ("opt", OPT | {"do_layer_norm_before": False}),
    "LayerNorm without weights": ("opt", OPT | {"layer_norm_elementwise_affine": False}),
    "no biases, gelu": ("opt", OPT | {"enable_bias": False, "activation_function": "gelu"}),
}
SITES = ["attention", "query_key", "value", "mlp", "inner"]
IDS = torch.arange(60).view(3, 20) * 7 % 96


def build(name: str) -> nn.Module:
    """Weights large enough that attention is far from uniform, norms and biases far from 1 and 0."""
    torch.manual_seed(0)
    family, settings = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, init_std=0.3, initializer_range=0.3))
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def randomize(places: dict, only: str | None = None) -> None:
    """s from 1/4 to 4 and δ of size 1, at one site or at all."""
    for name, place in places.items():
        if only in (None, name):
            place.site.scale.data = torch.exp2(torch.rand(len(place.site.scale)) * 4 - 2)
            if place.site.shift is not None:
                place.site.shift.data = torch.randn(len(place.site.shift))


def smoothed(name: str, only: str | None = None) -> nn.Module:
    model = build(name)
    for layer in model.get_decoder().layers:
        randomize(prepare_layer(layer, OFF, smoothing=True), only)
        refresh_layer(layer)
    return model


def distance(model: nn.Module, expected: torch.Tensor) -> float:
    return float((model(IDS).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_of_everything_is_exact(name):
    expected = build(name)(IDS).logits
    model = smoothed(name)
    assert distance(model, expected) < 1e-4
    assert is_plain(model, 20) == (MODELS[name][0] != "opt")
    assert float((model.get_output_embeddings()(decode(model, IDS)) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_exact_alone(name, site):
    """Alone, so that no other site hides it; and q and k have changed where they should."""
    plain = build(name)
    seen: dict[str, list] = {}
    for label, model in (("plain", plain), ("smoothed", smoothed(name, site))):
        attention = model.get_decoder().layers[0].self_attn
        outputs = seen.setdefault(label, [])
        for key in ("q_norm", "k_norm") if hasattr(attention, "q_norm") else ("q_proj", "k_proj"):
            attention.get_submodule(key).register_forward_hook(lambda *given, outputs=outputs: outputs.append(given[2].clone()))
        outputs.append(model(IDS).logits)
    assert float((seen["smoothed"][-1] - seen["plain"][-1]).norm() / seen["plain"][-1].norm()) < 1e-4
    moved = [float((a - b).norm() / a.norm()) for a, b in zip(seen["plain"][:2], seen["smoothed"][:2], strict=True)]
    assert all(m > 0.1 for m in moved) if site == "query_key" else all(m < 1e-4 for m in moved)


def of_wrong_heads(channels: Channels, dim: int) -> Channels:
    """Query heads in turns, instead of those of one key head in a row."""
    heads = len(channels.index) // dim
    order = torch.arange(heads).view(-1, 2).t().flatten()
    return Channels(channels.site, channels.index.view(heads, dim)[order].flatten(), channels.inverse)


def unpaired(channels: Channels) -> Channels:
    """Neighbours share an entry, as under the other convention of rotary embedding."""
    half = len(channels.index) // 2
    return Channels(channels.site, torch.arange(2 * half) // 2 % half, channels.inverse)


WRONG = {
    "o_proj: query heads in turns": ("GQA, rotary, RMSNorm", "o_proj", lambda m: setattr(m, "before", of_wrong_heads(m.before, 12))),
    "q_proj: query heads in turns": ("GQA, rotary, RMSNorm", "q_proj", lambda m: setattr(m, "after", of_wrong_heads(m.after, 12))),
    "q_norm: neighbours paired": ("norms of q and k", "q_norm", lambda m: setattr(m, "after", unpaired(m.after))),
    "k_proj: the scale of q": ("MHA, rotary, RMSNorm", "k_proj", lambda m: setattr(m, "after", Channels(m.after.site, m.after.index))),
    "v_proj: δ left out": ("MHA, rotary, RMSNorm", "v_proj", lambda m: setattr(m, "offset", None)),
    "fc1: δ left out": ("MHA, LayerNorm, no rotary", "fc1", lambda m: setattr(m, "offset", m.bias)),
    "norm: not folded": ("GQA, rotary, RMSNorm", "input_layernorm", lambda m: setattr(m, "folded", lambda: (m.weight, None))),
    "down_proj: input as it is": ("GQA, rotary, RMSNorm", "down_proj", lambda m: setattr(m, "own", False)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fold_is_seen(case):
    name, leaf, spoil = WRONG[case]
    expected, model = build(name)(IDS).logits, smoothed(name)
    assert distance(model, expected) < 1e-4
    for key, module in model.get_decoder().layers[1].named_modules():
        if key.rpartition(".")[2] == leaf:
            spoil(module)
    assert distance(model, expected) > 1e-2


def test_halves_of_a_rotated_pair_need_one_scale():
    """With an entry per channel instead of one per pair the same model is wrong: rotary embedding mixes the two."""
    expected, model = build("MHA, rotary, RMSNorm")(IDS).logits, smoothed("MHA, rotary, RMSNorm", "value")
    attention = model.get_decoder().layers[0].self_attn
    site = attention.q_proj.after.site
    site.scale.data = torch.exp2(torch.rand(48) * 4 - 2)
    attention.q_proj.after, attention.k_proj.after = Channels(site, None), Channels(site, None, inverse=True)
    refresh_layer(model.get_decoder().layers[0])
    assert distance(model, expected) > 1e-2


def test_every_module_of_a_layer_is_of_a_site():
    layer = smoothed("GQA, rotary, RMSNorm").get_decoder().layers[0]
    kinds = {name: type(module) for name, module in layer.named_modules() if isinstance(module, FakeQuantLinear | FoldedNorm)}
    assert sum(kind is FakeQuantLinear for kind in kinds.values()) == 7 and sum(kind is FoldedNorm for kind in kinds.values()) == 2
    assert all(layer.get_submodule(name).before is not None for name, kind in kinds.items() if kind is FakeQuantLinear)
    assert {name: tuple(p.shape) for name, p in layer.sites.named_parameters()} == {
        "attention.scale": (32,), "attention.shift": (32,), "query_key.scale": (12,), "value.scale": (24,), "value.shift": (24,),
        "mlp.scale": (32,), "mlp.shift": (32,), "inner.scale": (44,), "inner.shift": (44,),
    }  # fmt: skip


def test_norms_of_the_whole_width_are_refused_by_name():
    layer = build("norms of q and k").get_decoder().layers[0]
    layer.self_attn.q_norm.weight = nn.Parameter(torch.ones(48), requires_grad=False)
    with pytest.raises(BadInput, match="q_norm and k_norm of 48 and 12"):
        places(layer)
