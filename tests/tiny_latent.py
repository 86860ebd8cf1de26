"""Latent checkpoints of tiny models, with a quantizer whose every tensor is in use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import calibration, one_thread, tiny  # noqa: F401

from qzo.model.load import LoadedModel
from qzo.quantize import quantize_model

IDS = torch.arange(0, 240, 4)[None]


@pytest.fixture(scope="session")
def latent(tiny, calibration, tmp_path_factory) -> Callable[..., Path]:  # noqa: F811
    """(family, bits, group_size, activations) -> a latent checkpoint whose smoothing, clipping and grids are all in use. Not to be written to."""
    made: dict[tuple, Path] = {}

    def make(*case) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("latent") / "model"
            family, bits, size, activations = case
            quantize_model(str(tiny(family)), made[case], "zeroqat", bits, size, activations=activations, calibration=calibration, samples=12,
                           max_length=32, device="cpu")  # fmt: skip
            stir(made[case])
        return made[case]

    return make


def stir(folder: Path) -> None:
    """Move every tensor of the quantizer a little off what a search gives."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)

    def moved(name: str, value: torch.Tensor) -> torch.Tensor:
        noise, kind = torch.rand(value.shape, generator=generator), name.rpartition(".")[2]
        if kind in ("factor", "scale"):
            return value * (0.9 + 0.2 * noise)
        if kind == "span":
            return torch.full_like(value, 0.9)  # the Linears of one input share it
        return value + noise * {"low": 0.5, "high": 0.5, "move": 0.8, "shift": 0.1}.get(kind, 0)

    tensors = {name: moved(name, value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def logits(loaded: LoadedModel) -> torch.Tensor:
    return loaded.model(IDS, use_cache=False).logits.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
