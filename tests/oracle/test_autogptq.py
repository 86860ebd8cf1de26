"""auto-gptq 0.7.1's own packer and forward, as an independent reader and writer of the format."""

from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_model, write_recipe
from torch import nn
from wheels import install, libraries

from qzo.cli import main
from qzo.model.gptq_format import GptqConfig
from qzo.model.load import load_model
from qzo.model.save import FolderWriter
from qzo.quantize import quantize_model, rtn
from qzo.quantize.walk import write_linear
from qzo.rebuild import load_run


@pytest.fixture(scope="session")
def auto_gptq(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return libraries.auto_gptq(install(pytestconfig, tmp_path_factory, "auto-gptq-0.7.1"))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packs_to_the_same_bytes(auto_gptq, tmp_path, bits, group_size, sym):
    torch.manual_seed(bits)
    weight, config = torch.randn(64, 96), GptqConfig(bits, group_size, sym)
    result = rtn.quantize_weight(weight, config)
    linear = nn.Linear(96, 64, bias=False)
    linear.weight.data = result.dequantize()
    theirs = auto_gptq.QuantLinear(bits, group_size, 96, 64, bias=False)
    theirs.pack(linear, result.scales, result.zeros.float(), None)
    writer = FolderWriter(tmp_path / "out")
    write_linear(writer, "x", slice(0, 64), result, config)
    ours = load_file(writer.finish({}) / "model.safetensors")
    assert torch.equal(theirs.qweight, ours["x.qweight"])
    assert torch.equal(theirs.qzeros, ours["x.qzeros"])
    assert torch.equal(theirs.scales.half(), ours["x.scales"]) and ours["x.scales"].dtype == torch.float16
    assert torch.equal(theirs.g_idx, ours["x.g_idx"])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reads_what_quantize_writes(auto_gptq, tiny, calibration, tmp_path, bits, sym):
    out = tmp_path / "out"
    quantize_model(str(tiny("opt")), out, "gptq", bits, 32, sym, calibration=calibration, samples=12, max_length=32)
    tensors, loaded = load_file(out / "model.safetensors"), load_model(str(out), "cpu", "fp32")
    assert len(loaded.layers) == 12
    for name, layer in loaded.layers.items():
        theirs = auto_gptq.QuantLinear(bits, 32, layer.in_features, layer.out_features, bias=True, weight_dtype=torch.float32)
        held = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "g_idx", "scales", "bias")}
        theirs.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in held.items()}, strict=True)
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            assert torch.allclose(theirs(x), layer(x), rtol=1e-4, atol=1e-4)
            identity = theirs(torch.eye(layer.in_features)) - theirs.bias
            assert torch.allclose(identity.t(), layer.weight(torch.float32), atol=1e-6)


def test_reads_what_export_writes(auto_gptq, sentiment, tmp_path):
    """A tuned checkpoint dequantizes, by auto-gptq, to the run's codes under its scales rounded to fp16."""
    quantize_model(str(make_model(tmp_path / "wide", intermediate_size=96)), tmp_path / "w4", "rtn", 4, 32)
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "w4", sentiment, steps=3, lr=0.05)
    assert main(["tune", recipe]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    tensors, (run, _, steps) = load_file(tmp_path / "out/model.safetensors"), load_run(str(tmp_path / "run"), "cpu")
    base, bits, moved = load_model(str(tmp_path / "w4"), "cpu", "fp32"), run.config.bits, 0
    for name, layer in run.layers.items():
        size, shape = run.config.group_size, (layer.in_features, layer.out_features)
        theirs = auto_gptq.QuantLinear(bits, size, *shape, bias=False, weight_dtype=torch.float32)
        held = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "g_idx", "scales")}
        theirs.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in held.items()}, strict=True)
        with torch.no_grad():
            read = theirs(torch.eye(layer.in_features)).t()
        assert torch.allclose(read, layer.weight(torch.float32, layer.scales.half().float()), atol=1e-6)
        moved += not torch.allclose(read, base.layers[name].weight(torch.float32), atol=1e-6)
    assert steps == 3 and moved == len(run.layers)
