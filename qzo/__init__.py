"""qzo: fine-tune quantized language models without a backward pass."""

from importlib import import_module

from qzo.register import register as _register

__version__ = "0.1.0"

# Looked up on first use, so that `import qzo` and `qzo --help` stay fast.
_PUBLIC = {
    "quantize_model": "qzo.quantize", "tune_model": "qzo.tune", "export_run": "qzo.export", "replay_run": "qzo.replay",
    "load_model": "qzo.model.load", "prepare": "qzo.model.prepare", "evaluate_task": "qzo.evaluate", "perplexity": "qzo.evaluate",
    "Recipe": "qzo.recipe", "load_recipe": "qzo.recipe", "ZO": "qzo.zo.optimizer", "Scales": "qzo.zo.targets.scales",
    "ZOTrainer": "qzo.trainer",
}  # fmt: skip
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qzo' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


_register()
