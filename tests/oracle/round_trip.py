"""Tune a quantized folder, replay it, export it in its own format: what holds for every format."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import write_recipe

from qzo.cli import main
from qzo.export import export_run
from qzo.model.load import load_model
from qzo.rebuild import load_run

IDS = torch.arange(1, 25)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def our_logits(folder: Path, dtype: str) -> torch.Tensor:
    return logits(load_model(str(folder), "cpu", dtype).model)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tune_and_export(base: Path, sentiment: Path, work: Path, capsys) -> Path:
    """The exported folder of three large steps. Scales have moved, everything else is the base's, byte for byte."""
    recipe = write_recipe(work / "recipe.yaml", base, sentiment, steps=3, lr=0.05)
    run, out = str(work / "run"), work / "out"
    assert main(["tune", recipe, "--dry-run"]) == 0
    assert main(["tune", recipe]) == 0
    assert main(["replay", run, "--verify", "-o", str(work / "replayed")]) == 0
    assert main(["export", run, "-o", str(out)]) == 0
    assert "reloaded: logits equal" in capsys.readouterr().out
    before, after, replayed = tensors_of(base), tensors_of(out), tensors_of(work / "replayed")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {name: (t.dtype, t.shape) for name, t in after.items()}
    changed = {name for name, t in before.items() if not same_bytes(t, after[name])}
    scales = {name for name in before if name.endswith((".scales", ".weight_scale", ".SCB", ".absmax"))}
    assert changed == scales and all(same_bytes(t, replayed[name]) for name, t in after.items())
    for name, layer in load_run(run, "cpu", "fp32")[0].layers.items():
        key = next(key for key in scales if key.startswith(f"{name}."))
        stored = scales_in(key, after[key], layer.out_features)
        # Not every fp32 is an SCB over 127.
        torch.testing.assert_close(stored, layer.scales.to(stored.dtype), rtol=1.2e-7 if key.endswith("SCB") else 0, atol=0)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1] and not (out / "quantize_config.json").exists()
    return out


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Codes that are stored as floats may be NaN."""
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def scales_in(key: str, stored: torch.Tensor, rows: int) -> torch.Tensor:
    """[N, G] out of the tensor `key` of a checkpoint."""
    if key.endswith(".SCB"):
        return stored[:, None] / 127
    return stored.t() if key.endswith(".scales") and stored.dim() == 2 else stored.view(rows, -1)


def untouched(base: Path, work: Path) -> None:
    """The run of `work` after no step, exported, is the base."""
    export_run(str(work / "run"), str(work / "untouched"), to=0)
    before, after = tensors_of(base), tensors_of(work / "untouched")
    assert before.keys() == after.keys() and all(same_bytes(t, after[name]) for name, t in before.items())


def exports_hf(work: Path) -> None:
    """Plain weights, in fp16, of the run's scales in fp32; another quantized format is refused by name."""
    assert main(["export", str(work / "run"), "-o", str(work / "hf"), "--format", "hf"]) == 0
    written, (run, _, _) = tensors_of(work / "hf"), load_run(str(work / "run"), "cpu", "fp32")
    assert run.layers and all(torch.equal(written[f"{n}.weight"], layer.weight(torch.float16)) for n, layer in run.layers.items())
    assert not any(name.endswith(("scale", "scales", "packed", "qweight", "qzeros", "shape", "point", "SCB", "format", "absmax", "map", "4", "codes", "books")) for name in written)
    assert "quantization_config" not in json.loads((work / "hf" / "config.json").read_text())
    torch.testing.assert_close(our_logits(work / "hf", "fp32"), logits(run.model), rtol=0, atol=0.02)
    assert main(["export", str(work / "run"), "-o", str(work / "other"), "--format", "gptq_v2"]) == 2
