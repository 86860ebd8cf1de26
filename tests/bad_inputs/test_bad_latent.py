"""Latent checkpoints that are damaged, incomplete or newer: refused by name, without a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import calibration, one_thread, tiny  # noqa: F401

from qzo.quantize import quantize_model

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def latent(tiny, calibration, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("latent") / "model"
    quantize_model(str(tiny("llama")), out, "zeroqat", activations=8, calibration=calibration, samples=4, max_length=32, device="cpu")
    return out


def config(**keys):
    def edit(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document["quantization_config"] |= keys
        (folder / "config.json").write_text(json.dumps(document))

    return edit


def put(name, change=None):
    """Change a tensor; without `change` it goes."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        old = tensors.pop(name)
        save_file(tensors | ({} if change is None else {name: change(old).contiguous()}), folder / "model.safetensors")

    return edit


CASES = {
    "newer": (config(version=2), "quantization_config: version 2 of qzo_zeroqat; expected version 1"),
    "version": (config(version=True), "quantization_config: version True of qzo_zeroqat"),
    "no version": (config(version=None), "quantization_config: version None"),
    "bits": (config(bits=5), "quantization_config: bits 5; expected 2, 3, 4, 6 or 8"),
    "16 bits": (config(bits=16), "quantization_config: bits 16; expected 2, 3, 4, 6 or 8"),
    "group": (config(group_size=0), "quantization_config: group_size 0; expected a positive"),
    "odd group": (config(group_size=48), "group_size 48 with activations of 8 bits; expected a multiple of 32"),
    "other group": (config(group_size=32), ".low: torch.float32 of shape [64, 1]; expected torch.float32 of shape [64, 2]"),
    "activations": (config(activations="8"), "quantization_config: activations '8'; expected 4, 6, 8 or 16"),
    "smoothing": (config(smoothing=1), "quantization_config: smoothing 1; expected true or false"),
    "no clipping": (put(f"{Q}.low"), f"no tensor {Q}.low"),
    "no site": (put("model.layers.0.sites.value.shift"), "no tensor model.layers.0.sites.value.shift"),
    "no span": (put(f"{Q}.span"), f"no tensor {Q}.span"),
    "no weight": (put(f"{Q}.weight"), f"no tensor {Q}.weight"),
    "nan weight": (put(f"{Q}.weight", lambda t: t * float("nan")), f"{Q}.weight: infinities or NaN; expected finite weights"),
    "infinite weight": (put(f"{Q}.weight", lambda t: t.index_fill(0, torch.tensor(0), float("inf"))), f"{Q}.weight: infinities or NaN"),
    "half": (put(f"{Q}.high", torch.Tensor.half), f"{Q}.high: torch.float16 of shape [64, 1]; expected torch.float32"),
    "nan": (put(f"{Q}.high", lambda t: t * float("nan")), f"{Q}.high: values that no quantizer has"),
    "zero": (put("model.layers.0.sites.inner.scale", torch.zeros_like), "sites.inner.scale: values that no quantizer has; expected finite numbers, positive"),
    "infinite": (put("model.layers.0.sites.inner.shift", lambda t: t + float("inf")), "sites.inner.shift: values that no quantizer has"),
    "span": (put(f"{Q}.span", torch.Tensor.neg), f"{Q}.span: values that no quantizer has"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folder(case, latent, tmp_path, refused):
    folder = shutil.copytree(latent, tmp_path / "model")
    damage, says = CASES[case]
    damage(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    refused("evaluate", folder, "--perplexity", tmp_path / "text.txt", "--device", "cpu", says=says)


def test_a_run_on_an_incomplete_folder(latent, tmp_path, refused):
    """The estimate, which reads shapes alone, comes first there."""
    folder = shutil.copytree(latent, tmp_path / "model")
    put(f"{Q}.weight")(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    keys = (f"model={folder}", f"data={tmp_path / 'text.txt'}", "eval_split=train", "max_length=16", f"output_dir={tmp_path / 'run'}")
    refused("tune", "zeroqat-w4a4", *keys, says=[f"no tensor {Q}.weight", "incomplete"])
