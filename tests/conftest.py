"""Shared fixtures. Triton must see TRITON_INTERPRET before its first import, so it is set here where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of local models and data (`../shared`); a test that needs it skips where it is absent."""
    path = Path(os.environ.get("QZO_SHARED", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"needs the local models and data in {path.name}/ beside the project")
    return path
