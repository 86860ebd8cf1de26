"""The search over smoothing and clipping on tiny models: what it gives, what it leaves in memory, and that each part earns its place."""

from functools import cache
from pathlib import Path

import pytest
import torch

from qzo.model.files import Folder
from qzo.model.load import load_model, skeleton
from qzo.model.qat import FakeQuantLinear, Precision, load_quantizer_state, prepare_layer, quantize_operands
from qzo.quantize import inputs
from qzo.quantize.initialize import Initialization, initialize

CPU = torch.device("cpu")
A4, W2 = Precision(4, -1, 4), Precision(2, 32, 16)


@cache
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (40, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", 512)


def search(path: Path, what: Initialization) -> tuple[list[dict], list[str]]:
    folder, states, lines = Folder(path), [], []
    network = skeleton(folder)

    def keep(index: int, state: dict, error: float) -> None:
        assert index == len(states)
        states.append(state)
        inside = [i for i, layer in enumerate(network.get_decoder().layers) if not next(iter(layer.parameters())).is_meta]
        assert inside == [index]

    initialize(network, folder, windows(), what, CPU, torch.float32, keep, lines.append)
    assert all(parameter.is_meta for parameter in network.get_decoder().layers.parameters())
    return states, lines


def spread(path: Path, out: Path) -> Path:
    """The same function with a few channels 30 times larger before the Linears that read a norm, as large models have them."""
    loaded = load_model(str(path), "cpu", "fp32").model
    for layer in loaded.get_decoder().layers:
        attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        opt = hasattr(layer, "fc1")
        norms = [layer.self_attn_layer_norm, layer.final_layer_norm] if opt else [layer.input_layernorm, layer.post_attention_layernorm]
        for norm, readers in zip(norms, [attention, [layer.fc1] if opt else [layer.mlp.gate_proj, layer.mlp.up_proj]], strict=True):
            for tensor in [norm.weight] + ([norm.bias] if opt else []):
                tensor.data[::13] *= 30
            for reader in readers:
                reader.weight.data[:, ::13] /= 30
    loaded.save_pretrained(out)
    return out


@torch.no_grad()
def distance(path: Path, what: Initialization, states: list[dict] | None) -> float:
    """Of the logits of the quantized model from those of the 16-bit one, relative; without states, with the whole range of every group."""
    loaded = load_model(str(path), "cpu", "fp32").model
    ids = windows()[:20]
    expected = loaded(ids).logits
    quantize_operands(loaded)
    for index, layer in enumerate(loaded.get_decoder().layers):
        prepare_layer(layer, what.precision, what.smoothing)
        for module in layer.modules():
            if isinstance(module, FakeQuantLinear) and states is None:
                module.low.data.fill_(float("inf"))
                module.high.data.fill_(float("inf"))
                module.refresh()
        if states is not None:
            load_quantizer_state(layer, states[index])
    return float((loaded(ids).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_smoothing_and_search_undo_large_channels(tiny, tmp_path, family):
    path = spread(tiny(family), tmp_path / "spread")
    whole, bare = Initialization(A4, True, True), Initialization(A4, False, True)
    rounded, smoothed, unsmoothed = distance(path, bare, None), distance(path, whole, search(path, whole)[0]), distance(path, bare, search(path, bare)[0])
    assert smoothed < 0.7 * rounded and smoothed < 0.8 * unsmoothed, (rounded, smoothed, unsmoothed)


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_clipping_of_low_bits(tiny, family):
    what = Initialization(W2, False, True)
    states, lines = search(tiny(family), what)
    found, whole = distance(tiny(family), what, states), distance(tiny(family), what, None)
    assert found < 0.88 * whole, (found, whole)
    assert sum("clipping" in line for line in lines) == 8 and sum("layer" in line for line in lines) == 2


def test_the_same_again_and_what_is_kept(tiny):
    what = Initialization(Precision(4, 32, 8), True, True)
    (first, _), (second, _) = search(tiny("qwen2"), what), search(tiny("qwen2"), what)
    assert [s.keys() for s in first] == [s.keys() for s in second]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    shapes = {name: tuple(tensor.shape) for name, tensor in first[0].items()}
    assert shapes["mlp.down_proj.low"] == shapes["mlp.down_proj.high"] == (64, 3)
    assert shapes["sites.query_key.scale"] == (16,) and shapes["sites.inner.shift"] == (96,) and len(shapes) == 6 * 7 + 9
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in first[0].values())


def test_activations_alone(tiny):
    """16-bit weights have no bounds: sites and spans are what is left to search."""
    what = Initialization(Precision(16, -1, 4), True, True)
    states, lines = search(tiny("llama"), what)
    assert not any("clipping" in line for line in lines) and not any(name.endswith((".low", ".high")) for name in states[0])
    assert any(bool((tensor != 1).any()) for name, tensor in states[0].items() if name.endswith((".scale", ".span")))


def test_without_anything_it_is_rounding_to_nearest(tiny):
    what = Initialization(A4, False, False)
    states, _ = search(tiny("llama"), what)
    assert distance(tiny("llama"), what, states) == distance(tiny("llama"), what, None)
