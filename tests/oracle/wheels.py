"""Packages that would not fit into the test environment, each in a folder of its own, without what they depend on; then transformers uses them."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def install(config: pytest.Config, factory: pytest.TempPathFactory, name: str, holds: str, *arguments: str) -> Path:
    """A folder with the packages that pip installs for `arguments`, kept in the test cache as `name`; `holds` is a file of it."""
    cache = getattr(config, "cache", None)
    folder = Path(cache.mkdir(name)) if cache else factory.mktemp(name)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same test run may want it too
        if not (folder / holds).exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *arguments]
            done = subprocess.run([*command, "--upgrade", "--target", str(folder)], capture_output=True, text=True)
            assert done.returncode == 0, f"{name} could not be installed:\n{done.stderr}"
    return folder


@contextmanager
def used_by_transformers(folder: Path, method: str, quantizer: type, config: type) -> Iterator[None]:
    """The packages in `folder` can be imported, and transformers reads `method` by its own classes: qzo took over when they were absent."""
    from transformers.quantizers import auto

    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(folder))
        m.setitem(auto.AUTO_QUANTIZER_MAPPING, method, quantizer)
        m.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, config)
        yield
