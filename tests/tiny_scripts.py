"""The programs in scripts/ as modules."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """A module of scripts/, with or without a suffix."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        path = next(p for p in (SCRIPTS / name, SCRIPTS / f"{name}.py") if p.exists())
        if path.suffix:
            return __import__(name)
        loader = SourceFileLoader(name, str(path))
        module = module_from_spec(spec_from_loader(name, loader))
        loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))
