"""Other libraries of quantized checkpoints as writers and readers: each in a folder of its own, without what it depends on."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from bench_awq import load, read, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto
from transformers.utils import import_utils

# What is used of them is plain Python: one wheel serves every interpreter.
_ANY = ("--python-version=3.11", "--implementation=cp", "--platform=manylinux2014_x86_64")
GPTQ_FILE = "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py"
# name -> (a file of it, what pip is asked for)
PACKAGES = {
    "autoawq-0.2.7": ("awq/modules/linear/gemm.py", (*_ANY, "autoawq==0.2.7.post3")),
    "auto-gptq-0.7.1": (GPTQ_FILE, (*_ANY, "auto-gptq==0.7.1")),
    "aqlm-1.1.7": ("aqlm/inference.py", ("aqlm==1.1.7",)),
    "compressed-tensors-0.20.0": ("compressed_tensors/version.py", ("compressed-tensors==0.20.0", "loguru==0.7.3", "psutil")),
    # The last series that knows actorder=group.
    "compressed-tensors-0.9.4": ("compressed_tensors/version.py", ("compressed-tensors==0.9.4",)),
}  # fmt: skip


def install(root: Path, name: str) -> Path:
    """The folder root/name with the packages of PACKAGES[name], put there by pip if they are not. Raises RuntimeError where that fails."""
    folder, (holds, arguments) = root / name, PACKAGES[name]
    if not (folder / holds).exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *arguments]
        done = subprocess.run([*command, "--upgrade", "--target", str(folder)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} could not be installed:\n{done.stderr}")
    return folder


@contextmanager
def used_by_transformers(folder: Path, method: str, quantizer: type, config: type) -> Iterator[None]:
    """The packages in `folder` can be imported, and transformers reads `method` by its own classes: qzo took over when they were absent."""
    with (
        patch.object(sys, "path", [str(folder), *sys.path]), patch.dict(auto.AUTO_QUANTIZER_MAPPING, {method: quantizer}),
        patch.dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, {method: config}),
    ):  # fmt: skip
        importlib.invalidate_caches()
        yield


@contextmanager
def compressed_tensors(folder: Path) -> Iterator[None]:
    """transformers with the compressed-tensors in `folder`."""
    with used_by_transformers(folder, "compressed-tensors", auto.CompressedTensorsHfQuantizer, auto.CompressedTensorsConfig):
        import_utils.is_compressed_tensors_available.cache_clear()
        yield
    import_utils.is_compressed_tensors_available.cache_clear()


def auto_gptq(folder: Path) -> ModuleType:
    """auto-gptq 0.7.1's packer and forward. The package no longer imports beside transformers 5: its one file is loaded by path."""
    spec = importlib.util.spec_from_file_location("autogptq_qlinear_cuda_old", folder / GPTQ_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_bitsandbytes(base: Path, out: Path, dtype: torch.dtype = torch.float16, **how: Any) -> Path:
    """The folder as transformers saves it with bitsandbytes; how: arguments of BitsAndBytesConfig."""
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**how), dtype=dtype)
    model.save_pretrained(out)
    _copy_tokenizer(base, out)
    return out


def write_compressed(base: Path, out: Path, bits: int, strategy: str, size: int | None, sym: bool, dtype: torch.dtype) -> Path:
    """The folder as compressed-tensors saves it, pack-quantized, weights rounded to nearest: strategy group, with its size, or channel."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    how = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=size, symmetric=sym)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized"))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            rows, cols = module.weight.shape
            groups = module.weight.data.float().view(rows, -1, size or cols)
            scales, zeros = calculate_qparams(groups.amin(2), groups.amax(2), how)
            module.weight_scale.data = scales.to(dtype)
            if not sym:
                module.weight_zero_point.data = zeros.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    _copy_tokenizer(base, out)
    return out


def _copy_tokenizer(base: Path, out: Path) -> None:
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, out / path.name)


def read_weights(method: str, folder: Path, packages: Path | None) -> dict[str, Tensor]:
    """The quantized Linears' weights fp16 [N, K] by name, as the library of `method` (config.json's quant_method) makes them on a CPU.

    packages: the folder that the library was installed into; bitsandbytes has none.
    """
    return _READERS[method](folder, packages)


def _of_transformers(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **how).eval()


def _linears(model: Any) -> dict[str, Tensor]:
    return {name: module.weight.data for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}


def _bitsandbytes(folder: Path, packages: Path | None) -> dict[str, Tensor]:
    return _linears(_of_transformers(folder).dequantize(dtype=torch.float16))


def _awq(folder: Path, packages: Path) -> dict[str, Tensor]:
    awq = load(packages)
    return weights(awq, read(awq, folder))


def _compressed(folder: Path, packages: Path) -> dict[str, Tensor]:
    from transformers import CompressedTensorsConfig

    with compressed_tensors(packages):
        # Without it, transformers 5.23 takes no packed zero points.
        return _linears(_of_transformers(folder, quantization_config=CompressedTensorsConfig(dequantize=True)))


def _parts(folder: Path, last: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors by the end of their names) of each Linear that has a tensor `last`."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(f".{last}") for name in tensors if name.endswith(f".{last}")]:
        yield name, {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _aqlm(folder: Path, packages: Path) -> dict[str, Tensor]:
    with patch.object(sys, "path", [str(packages), *sys.path]):
        from aqlm.utils import _dequantize_weight, unpack_int_data
    found = {}
    for name, held in _parts(folder, "codebooks"):
        codes = unpack_int_data(held["codes"], held["codebooks"].shape[1].bit_length() - 1)
        found[name] = _dequantize_weight(codes, held["codebooks"].float(), held["scales"].float()).half()
    return found


def _gptq(folder: Path, packages: Path) -> dict[str, Tensor]:
    from qzo.model.files import Folder

    module, settings, found = auto_gptq(packages), Folder(folder).config["quantization_config"], {}
    for name, held in _parts(folder, "qweight"):
        cols, rows = len(held["g_idx"]), held["qweight"].shape[1]
        theirs = module.QuantLinear(settings["bits"], settings["group_size"], cols, rows, bias=False, weight_dtype=torch.float32)
        theirs.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in held.items() if key != "bias"}, strict=True)
        with torch.no_grad():
            found[name] = theirs(torch.eye(cols)).t().half()
    return found


_READERS = {"bitsandbytes": _bitsandbytes, "awq": _awq, "compressed-tensors": _compressed, "aqlm": _aqlm, "gptq": _gptq}
