"""Packages that would not fit into the test environment, each in a folder of its own, without what they depend on."""

import subprocess
import sys
from pathlib import Path

import pytest


def install(config: pytest.Config, factory: pytest.TempPathFactory, name: str, holds: str, *arguments: str) -> Path:
    """A folder with the packages that pip installs for `arguments`, kept in the test cache as `name`; `holds` is a file of it."""
    cache = getattr(config, "cache", None)
    folder = Path(cache.mkdir(name)) if cache else factory.mktemp(name)
    if not (folder / holds).exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *arguments]
        done = subprocess.run([*command, "--upgrade", "--target", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, f"{name} could not be installed:\n{done.stderr}"
    return folder
