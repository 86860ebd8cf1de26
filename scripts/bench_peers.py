"""One step of another program at the size of a known model, random weights made on the device: a line of JSON with its peak.

    python scripts/bench_peers.py mezo 13b 16x256       # MeZO (arXiv 2305.17333) on 16-bit weights
    python scripts/bench_peers.py qlora 13b 1x64        # QLoRA (arXiv 2305.14314): NF4, LoRA of rank 64 on every Linear, AdamW

The peak is of the steps, after the model is made. QLoRA runs as bitsandbytes and PEFT give it: double quantization, gradient
checkpointing, 16-bit computation.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_models import MeZO, batch_of, dense_model, eager_loss, fill, skeleton
from torch import nn

STEPS = 5


def nf4(linear: nn.Linear, device: torch.device) -> nn.Module:
    """The Linear of random weights in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = torch.randn(linear.weight.shape, dtype=torch.bfloat16, device=device) * 0.02
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made).to(device)
    return made


def qlora(like: str, size: str, device: torch.device) -> Callable[[], Any]:
    """A step of QLoRA."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = skeleton(like, torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, nf4(module, device))
    fill(model, device)
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = batch_of(*map(int, size.split("x")), model.config.vocab_size, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = eager_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def mezo(like: str, size: str, device: torch.device) -> Callable[[], Any]:
    """A step of MeZO."""
    model = dense_model(like, device, torch.bfloat16)
    batch = batch_of(*map(int, size.split("x")), model.config.vocab_size, device)
    step = partial(MeZO(model, in_place=True).step, partial(eager_loss, model, batch))
    return torch.no_grad()(step)


def measure(program: str, like: str, size: str, device: torch.device) -> dict[str, Any]:
    """Peak and time of the steps after the first."""
    step = {"mezo": mezo, "qlora": qlora}[program](like, size, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(STEPS):
        if number == 1:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
        step()
    if cuda:
        torch.cuda.synchronize()
    row = {"program": program, "model": like, "size": size, "ms_per_step": 1e3 * (time.perf_counter() - began) / (STEPS - 1)}
    return row | ({"peak_gb": torch.cuda.max_memory_reserved() / 1e9} if cuda else {})


def main() -> None:
    program, like, size = sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(measure(program, like, size, device)))


if __name__ == "__main__":
    main()
