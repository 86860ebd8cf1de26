"""autoawq 0.2.7's own packer and unpacker (WQLinear_GEMM on a CPU), as an independent reader and writer of AWQ gemm.

The package itself needs accelerate and an older transformers: its files are imported alone, under empty parent packages.
"""

import importlib
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from round_trip import exports_hf, logits, our_logits, tensors_of, tune_and_export, untouched
from safetensors.torch import save_file
from tiny_runs import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from wheels import install

from qzo.model.load import load_model

# The wheel is plain Python: one serves every interpreter.
PIP = ("--python-version=3.11", "--implementation=cp", "--platform=manylinux2014_x86_64", "autoawq==0.2.7.post3")
PARENTS = ("awq", "awq.modules", "awq.modules.linear", "awq.models", "awq.utils")


@pytest.fixture(scope="session")
def awq(pytestconfig, tmp_path_factory):
    """gemm, packing and config modules of autoawq."""
    folder = install(pytestconfig, tmp_path_factory, "autoawq-0.2.7", "awq/modules/linear/gemm.py", *PIP)
    before = set(sys.modules)
    for name in PARENTS:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]
    sys.modules.setdefault("accelerate", ModuleType("accelerate"))  # imported at the top, used on GPUs only
    found = SimpleNamespace(
        gemm=importlib.import_module("awq.modules.linear.gemm"), packing=importlib.import_module("awq.utils.packing_utils"),
        config=importlib.import_module("awq.models._config"),
    )  # fmt: skip
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("awq", "accelerate"):
            del sys.modules[name]
    found.gemm.get_best_device = lambda: "cpu"
    return found


def quantize(awq, linear, size):
    """autoawq's module for a Linear: asymmetric over each group, as its quantizer does."""
    weight = linear.weight.data.float()
    groups = weight.view(len(weight), -1, weight.shape[1] if size == -1 else size)
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low).clamp(min=1e-5) / 15).half().float()
    zeros = (-torch.round(low / scales)).clamp(0, 15)
    codes = (torch.round(groups / scales[..., None]) + zeros[..., None]).clamp(0, 15)
    linear = nn.Linear(weight.shape[1], len(weight), bias=linear.bias is not None)
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).view_as(weight)
    # Its loop over columns divides by the group size as given: -1 would not do.
    size = groups.shape[2]
    return awq.gemm.WQLinear_GEMM.from_linear(linear, 4, size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())


def replaced(model, make):
    """The model with `make(Linear)` for the Linears of its decoder layers."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, make(module))
    return model


@pytest.fixture(scope="module")
def made(awq, tmp_path_factory):
    """group size -> a folder as autoawq saves it."""
    base, folders = make_model(tmp_path_factory.mktemp("awq16") / "model", intermediate_size=96), {}

    def make(size):
        if size not in folders:
            out = folders[size] = shutil.copytree(base, tmp_path_factory.mktemp("awq") / "model")
            model = replaced(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16), lambda linear: quantize(awq, linear, size))
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "model.safetensors")
            config = json.loads((out / "config.json").read_text())
            config["quantization_config"] = awq.config.AwqConfig(q_group_size=size, version="GEMM").to_transformers_dict()
            (out / "config.json").write_text(json.dumps(config))
        return folders[size]

    return make


def their_model(awq, folder):
    """The folder as autoawq's modules hold it: every tensor must find its place."""
    config = AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    del config.quantization_config
    make = awq.gemm.WQLinear_GEMM.from_linear
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model = replaced(model, lambda linear: make(linear, settings["bits"], settings["group_size"], init_only=True)).eval()
    model.load_state_dict(tensors_of(folder), strict=True)
    return model


def dense(awq, model):
    """The same with autoawq's dequantized weights in Linears: the forward of its modules without a GPU fails by an unset name."""

    def make(theirs):
        linear = nn.Linear(theirs.in_features, theirs.out_features, bias=False, dtype=torch.float16)
        weight = awq.packing.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, theirs.group_size)
        linear.weight.data = weight.t().contiguous()
        return linear

    for name, module in list(model.named_modules()):
        if isinstance(module, awq.gemm.WQLinear_GEMM):
            model.set_submodule(name, make(module))
    return model


@pytest.mark.parametrize("size", [16, 32, -1])
def test_reads_what_autoawq_writes(awq, made, size):
    folder = made(size)
    model, loaded = their_model(awq, folder), load_model(str(folder), "cpu", "fp16")
    assert len(loaded.layers) == 7 and loaded.config.version == "awq"
    for name, layer in loaded.layers.items():
        module = model.get_submodule(name)
        weight = awq.packing.dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, module.group_size)
        assert layer.zeros is not None and torch.equal(layer.weight(torch.float16), weight.t())
    assert torch.equal(our_logits(folder, "fp16"), logits(dense(awq, model)))


@pytest.mark.parametrize("size", [32, -1])
def test_autoawq_reads_what_export_writes(awq, made, size, sentiment, tmp_path, capsys):
    base = made(size)
    out = tune_and_export(base, sentiment, tmp_path, capsys)
    theirs = logits(dense(awq, their_model(awq, out)))
    assert torch.equal(our_logits(out, "fp16"), theirs)
    assert not torch.equal(our_logits(base, "fp16"), theirs)
    untouched(base, tmp_path)
    exports_hf(tmp_path)
