"""Shared fixtures. Triton must see TRITON_INTERPRET before its first import, so it is set here where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch
from tiny_runs import llama4, llama4_copy, llama16, recipe, sentiment  # noqa: F401

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


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN: an element that a kernel forgets is seen."""
    real = torch.empty

    def empty(*shape, **options):
        made = real(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failed run: it would hide what nobody looks at."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("QZO_NO_SKIP") and reporter and reporter.stats.get("skipped"):
        reporter.write_line(f"{len(reporter.stats['skipped'])} tests were skipped; QZO_NO_SKIP forbids it")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
