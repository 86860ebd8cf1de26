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
CORES = len(os.sched_getaffinity(0))
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The processes share the cores: so many threads for this one, and for the programs that its tests start.
    torch.set_num_threads(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a process per core, up to 8, for the whole suite; what somebody selected, or what needs a GPU, starts faster in one."""
    selected = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
    alone = selected or config.option.usepdb or "not gpu" not in config.option.markexpr
    return 0 if alone or CORES == 1 else min(CORES, 8)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failed run: it would hide what nobody looks at."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("QZO_NO_SKIP") and reporter and reporter.stats.get("skipped"):
        reporter.write_line(f"{len(reporter.stats['skipped'])} tests were skipped; QZO_NO_SKIP forbids it")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
