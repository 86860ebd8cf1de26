"""autoawq 0.2.7's own packer and unpacker (WQLinear_GEMM on a CPU), as an independent writer and reader of AWQ gemm.

The package itself needs accelerate and an older transformers: its files are imported alone, under empty parent packages. Weights are
rounded as they are: its search for scales by activations does not run here.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

PARENTS = ("awq", "awq.modules", "awq.modules.linear", "awq.models", "awq.utils")


def load(folder: Path) -> SimpleNamespace:
    """gemm, packing and config modules of the autoawq in `folder`."""
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


def quantize(awq: SimpleNamespace, linear: nn.Linear, size: int) -> nn.Module:
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


def _replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """The model with `make(Linear)` for the Linears of its decoder layers."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, make(module))
    return model


def write(awq: SimpleNamespace, base: Path, out: Path, size: int) -> Path:
    """The 16-bit folder `base` with groups of `size`, -1 for whole rows, as autoawq saves it in the new folder `out`."""
    model = _replaced(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16), lambda linear: quantize(awq, linear, size))
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    out.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    for path in [*base.glob("generation_config*"), *base.glob("tokenizer*")]:
        shutil.copyfile(path, out / path.name)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = awq.config.AwqConfig(q_group_size=size, version="GEMM").to_transformers_dict()
    (out / "config.json").write_text(json.dumps(config))
    return out


def read(awq: SimpleNamespace, folder: Path) -> Any:
    """The folder as autoawq's modules hold it: every tensor must find its place."""
    config = AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    del config.quantization_config
    make = awq.gemm.WQLinear_GEMM.from_linear
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model = _replaced(model, lambda linear: make(linear, settings["bits"], settings["group_size"], init_only=True)).eval()
    tensors = load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model


def weights(awq: SimpleNamespace, model: Any) -> dict[str, Tensor]:
    """autoawq's dequantized weights fp16 [N, K] by name, of what `read` gave."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, awq.gemm.WQLinear_GEMM)}
    return {name: awq.packing.dequantize_gemm(m.qweight, m.qzeros, m.scales, 4, m.group_size).t() for name, m in found.items()}


def dense(awq: SimpleNamespace, model: Any) -> Any:
    """The same with those weights in Linears: the forward of its modules without a GPU fails by an unset name."""
    for name, weight in weights(awq, model).items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
        linear.weight.data = weight.contiguous()
        model.set_submodule(name, linear)
    return model
