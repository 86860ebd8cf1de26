"""What `import qzo` does for transformers: `from_pretrained` reads quantized folders by qzo where its own library for them is absent.

transformers claims the formats that qzo reads (GPTQ, AWQ, AQLM, compressed-tensors) and asks for other packages to read them. A name
of our own in config.json would keep every other reader out, and transformers gives a model random weights under a name
that it does not know. So the names stay, and qzo steps in only for what would otherwise be an ImportError. Checkpoints of ZeroQAT,
with grids of activations, have no other reader: the packed one is read, and the latent one, which would pass for its 16-bit model, refused.
Nothing is imported here: transformers may come later, or never.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLES = "transformers.quantizers.auto"
# Format -> the packages without which transformers cannot read it.
NEEDED = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel", "accelerate"), "compressed-tensors": ("compressed_tensors",), "aqlm": ("aqlm", "accelerate")}
OWN = ("qzo_packed", "qzo_zeroqat")


def register() -> None:
    """Do it now if transformers is imported, else as soon as it is."""
    if TABLES in sys.modules:
        _register(sys.modules[TABLES])
    elif _Watch not in sys.meta_path:
        sys.meta_path.insert(0, _Watch)


def _register(tables: ModuleType) -> None:
    from qzo.model.pretrained import CheckpointConfig, CheckpointQuantizer

    absent = (method for method, packages in NEEDED.items() if any(find_spec(package) is None for package in packages))
    for method in (*OWN, *absent):
        tables.AUTO_QUANTIZER_MAPPING[method] = CheckpointQuantizer
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = CheckpointConfig


class _Watch:
    """A finder that finds nothing, but sees the import of the tables."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(_Watch)
        spec = find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = executed
        return spec
