"""Packages that would not fit into the test environment, in folders of their own (scripts/bench_libraries.py) that the test cache keeps."""

from pathlib import Path

import pytest
from tiny_scripts import script

libraries = script("bench_libraries")


def install(config: pytest.Config, factory: pytest.TempPathFactory, name: str) -> Path:
    """The folder of libraries.PACKAGES[name]."""
    cache = getattr(config, "cache", None)
    return libraries.install(Path(cache.mkdir(name)).parent if cache else factory.mktemp("packages"), name)
