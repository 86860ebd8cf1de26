"""The walk over the layers: which inputs the Hessians are made of, and which Linears share one."""

import pytest
import torch

from qzo.model.files import Folder
from qzo.model.gptq_format import GptqConfig
from qzo.model.load import load_model, skeleton
from qzo.quantize.resume import LayerWriter
from qzo.quantize import gptq, quantize_model
from qzo.quantize.inputs import add_second_moment, mirror_upper
from qzo.quantize.walk import Walk


@pytest.mark.parametrize("cols", [1, 7, 8, 37, 64])
def test_second_moment_is_that_of_brute_force(cols):
    torch.manual_seed(cols)
    x, hessian = torch.randn(50, cols), torch.zeros(cols, cols)
    for part in x.split(13):
        add_second_moment(hessian, part)
    expected = sum(row[:, None] * row[None] for row in x.double())
    assert torch.allclose(hessian.triu().double(), expected.triu(), rtol=1e-5, atol=1e-5)
    whole = hessian.triu() + hessian.triu(1).t()
    mirror_upper(hessian)
    assert torch.equal(hessian, whole)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "opt"])
def test_every_hessian_is_of_the_inputs_in_the_quantized_model(tiny, tmp_path, monkeypatch, family):
    """What a Linear is given while it is quantized is what it is given in the finished model: all before it is quantized."""
    torch.manual_seed(0)
    windows = torch.randint(0, 256, (150, 32))  # more than one batch of windows
    seen, reported = [], []
    original = gptq.quantize_weight

    def spy(weight, config, hessian):
        seen.append(hessian.clone())
        return original(weight, config, hessian)

    monkeypatch.setattr(gptq, "quantize_weight", spy)
    folder, config = Folder(tiny(family)), GptqConfig(4, 32)
    walk = Walk(skeleton(folder), folder, config, torch.device("cpu"), torch.float32)
    walk.run(windows, LayerWriter(tmp_path / "unused", {}), lambda names, error: reported.append((names, error)))
    attention = ["q_proj", "k_proj", "v_proj"], ["out_proj" if family == "opt" else "o_proj"]
    inner = (["fc1"], ["fc2"]) if family == "opt" else (["gate_proj", "up_proj"], ["down_proj"])
    assert [sorted(n.rpartition(".")[2] for n in names) for names, _ in reported] == [sorted(s) for s in (*attention, *inner)] * 2
    assert all(0 < error < 0.3 for _, error in reported)
    assert all(parameter.is_meta for parameter in walk.layers.parameters())

    monkeypatch.undo()
    monkeypatch.setattr("qzo.quantize.calibration.load_windows", lambda *_: windows)
    monkeypatch.setattr("qzo.model.load.pick_dtype", lambda *_: torch.float32)
    quantize_model(str(tiny(family)), tmp_path / "out", group_size=32, calibration="x")
    loaded = load_model(str(tmp_path / "out"), "cpu", "fp32")
    inputs = {}
    for name, module in loaded.layers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])}))
    with torch.no_grad():
        loaded.model(windows)
    for (names, _), hessian in zip(reported, seen, strict=True):
        for name in names:
            expected = inputs[name].t() @ inputs[name] / windows.numel()
            assert torch.allclose(hessian, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_sliding_attention_gets_its_own_mask(tiny, tmp_path):
    """Layers of one model may be called with different masks."""
    folder = Folder(tiny("qwen2"))
    settings = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    folder.config.update(settings)
    network = skeleton(folder)
    for key, value in settings.items():
        setattr(network.config, key, value)
        setattr(network.model.config, key, value)
    network.model.has_sliding_layers = True
    walk = Walk(network, folder, GptqConfig(4, 32), torch.device("cpu"), torch.float32)
    _, kwargs = walk._first_inputs(torch.randint(0, 256, (3, 16)))
    full, sliding = (k["attention_mask"] for k in kwargs)
    assert full is None and sliding.shape == (1, 1, 16, 16) and int(sliding[0, 0, -1].sum()) == 4
