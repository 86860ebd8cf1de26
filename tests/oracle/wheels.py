"""Packages that would not fit into the test environment, in folders of their own (scripts/bench_libraries.py) that the test cache keeps."""

import fcntl
from pathlib import Path

import pytest
from tiny_scripts import script

libraries = script("bench_libraries")


def root(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    """The folder that they are installed into."""
    cache = getattr(config, "cache", None)
    return Path(cache.mkdir("packages")) if cache else factory.mktemp("packages")


def install(config: pytest.Config, factory: pytest.TempPathFactory, name: str) -> Path:
    """The folder of libraries.PACKAGES[name]."""
    into = root(config, factory)
    with (into / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same test run may want it too
        return libraries.install(into, name)
