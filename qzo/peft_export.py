"""Tuned adapters (qzo/zo/targets/lora.py) as a folder that peft reads, and with it what serves LoRA adapters."""

from collections.abc import Collection
from pathlib import Path

import torch

from qzo.errors import RunFailed
from qzo.model.save import FolderWriter

ADAPTER = "adapter_model.safetensors"


def write_peft(
    out: str | Path, state: dict[str, torch.Tensor], base: str, r: int, alpha: float, modules: Collection[str], card: str = ""
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors (fp32) to the new folder `out`.

    state: `Lora.state()`, "<module>.lora_A/lora" [r, K] and "<module>.lora_B/lora" [N, r]; what other targets tuned is not in an
    adapter and refused. modules: the last names of the layers with adapters. base: the model's name or folder, for the config. card: README.md.
    RunFailed for a state that is not such adapters; as FolderWriter for what cannot be written.
    """
    tensors = {}
    for name, value in state.items():
        module, _, part = name.removesuffix("/lora").rpartition(".")
        rank = {"lora_A": value.shape[0], "lora_B": value.shape[-1]}.get(part)
        if not name.endswith("/lora") or rank != r or module.rpartition(".")[2] not in modules:
            raise RunFailed(name, f"shape {list(value.shape)}", f"lora_A or lora_B of rank {r} of {', '.join(modules)}",
                            "Only adapters can be exported for peft.")  # fmt: skip
        tensors[f"base_model.model.{module}.{part}.weight"] = value.detach().to("cpu", torch.float32).contiguous()
    with FolderWriter(out) as writer:
        writer.save(tensors, writer.partial / ADAPTER)
        if card:
            writer.write_text("README.md", card)
        return writer.place({"adapter_config.json": _config(base, r, alpha, modules)})


def _config(base: str, r: int, alpha: float, modules: Collection[str]) -> dict:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r, "lora_alpha": alpha,
        "target_modules": list(modules), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
