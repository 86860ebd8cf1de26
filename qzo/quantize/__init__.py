"""A 16-bit model folder in, a GPTQ, bitsandbytes or latent (ZeroQAT) checkpoint out."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qzo.errors import BadInput, OutOfMemory
from qzo.signals import StopSignals

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qzo.model.files import Folder
    from qzo.model.save import FolderWriter
    from qzo.model.uniform import Quantization
    from qzo.quantize.resume import LayerWriter
    from qzo.quantize.walk import Walk
    from qzo.quantize.zeroqat import LatentWalk

METHODS = ("gptq", "rtn", "int8", "nf4", "fp4", "zeroqat")
FORMATS = ("gptq", "gptq_v2")
CALIBRATED = ("gptq", "zeroqat")
KEPT = "The layers that are done are kept; the same command continues."


def quantize_model(
    model: str, out: str | Path, method: str = "gptq", bits: int | None = None, group_size: int | None = None, sym: bool | None = None,
    desc_act: bool = False, format: str | None = None, calibration: str | None = None, samples: int = 128,
    max_length: int = 512, device: str = "auto", progress: Callable[[int, int, str], None] | None = None, restart: bool = False,
    activations: int | None = None, compensation: bool = True, reconstruct: int = 0,
) -> dict:  # fmt: skip
    """Quantize the Linears of a model's decoder layers and write the folder `out`; all else is copied through.

    One layer at a time is in memory. GPTQ and zeroqat read `samples` windows of `max_length` tokens (at most the model's
    context) from `calibration`; rtn, and bitsandbytes' int8, nf4 and fp4, need none. None: 4 bits, groups of 128 and the format gptq;
    for bitsandbytes its format and bits, and blocks of 64. zeroqat keeps 16-bit weights and writes a quantizer beside them, for weights with
    a zero point per group and for `activations` of 4, 6, 8 or 16 bits (None: 16, which is none), its group_size by default -1 with
    activations below 16; compensation: at 2 to 4 bits its latents are those that GPTQ would round to, false leaves them as they are;
    reconstruct: epochs of first-order reconstruction of each layer's quantizer before that, by back-propagation through the layer.
    `progress(linears done, in all, text)` is called first and after each set of Linears. sym: None is true, and zeroqat takes no other. Returns {linears, seconds, bytes_before, bytes_after, mean_relative_error, peak_memory}: the relative
    error of the Linears' outputs on the calibration inputs (zeroqat: of the layers'), of their weights without; bytes of the device, as memory.peak has them. Raises BadInput for what cannot be
    quantized, before any work.

    A call that was killed, interrupted or out of memory or disk space leaves the layers that it finished in
    `<out>.partial`; the same call continues after them, and writes the same tensors as one that nothing disturbed.
    With other settings it raises BadInput; `restart` discards them.
    """
    from qzo.memory import peak
    from qzo.model.files import Folder
    from qzo.model.load import load_tokenizer, pick_device, pick_dtype, skeleton
    from qzo.quantize.calibration import load_windows
    from qzo.quantize.resume import LayerWriter, settings_of
    from qzo.quantize.bnb import METHODS as LIBRARY
    from qzo.quantize.bnb import BnbWalk
    from qzo.quantize.walk import Walk
    from qzo.quantize.zeroqat import LatentWalk

    begin = time.monotonic()
    config = _settings(method, bits, group_size, sym, desc_act, format, calibration, samples, max_length, activations, compensation, reconstruct)
    folder = Folder(model)
    where = pick_device(device)
    dtype = pick_dtype("auto", where)
    network = skeleton(folder)
    names = _check_model(folder, network, config)
    windows = None
    if method in CALIBRATED:
        length = min(max_length, getattr(network.config, "max_position_embeddings", max_length))
        windows = load_windows(calibration, load_tokenizer(folder), samples, length, network.config.vocab_size)
    with LayerWriter(out, settings_of(folder, config, method, windows, where.type, str(dtype)), restart) as writer:
        arguments = (network, folder, config, where, dtype)
        if method == "zeroqat":
            walk = LatentWalk(network, folder, config, where)
        else:
            walk = BnbWalk(method, *arguments) if method in LIBRARY else Walk(*arguments)
        path = _write(walk, windows, names, writer, progress or (lambda *_: None))
    errors = [error for layer in writer.layers for error in layer]
    return {
        "linears": len(names), "seconds": time.monotonic() - begin,
        "bytes_before": _weight_bytes(folder.path), "bytes_after": _weight_bytes(path),
        "mean_relative_error": sum(errors) / len(errors), "peak_memory": peak(where),
    }  # fmt: skip


def _write(
    walk: "Walk | LatentWalk", windows: "Tensor | None", names: list[str], writer: "LayerWriter", progress: Callable[[int, int, str], None]
) -> Path:  # fmt: skip
    """The whole folder. A signal stops before the next set of Linears."""
    import torch

    done = sum(map(len, writer.layers))
    layers = f"{len(writer.layers)} of {len(walk.layers)}"
    progress(done, len(names), f"continues after layer {layers}" if done else f"layer 1 of {len(walk.layers)}")

    def report(linears: list[str], error: float) -> None:
        nonlocal done
        done += len(linears)
        leaves = " ".join(name.rpartition(".")[2] for name in linears)
        progress(done, len(names), f"{linears[0].rpartition('.')[0]} {leaves}: error {error:.4f}")

    def check() -> None:
        stop.do = KEPT if writer.layers else "No layer was done."
        stop.check()

    walk.say = lambda text: progress(done, len(names), text)
    with StopSignals(str(writer.out), "No layer was done.") as stop:
        try:
            walk.run(windows, writer, report, check)
        except torch.OutOfMemoryError as error:
            less = "a smaller max_length, or no reconstruct" if getattr(walk.config, "reconstruction", 0) else "or a smaller max_length"
            do = f"Use device=cpu, {less}" + (f", with restart. {KEPT}" if writer.layers else ".")
            raise OutOfMemory("quantize", str(error).splitlines()[0], "", do) from error
        check()
        _copy_rest(walk.folder, walk.model, names, writer)
        walk.folder.copy_side_files(writer.partial)
        check()
        document, extra = walk.documents(names)
        return writer.finish({**walk.folder.config, "quantization_config": document}, extra)


def _settings(
    method: str, bits: int | None, group_size: int | None, sym: bool | None, desc_act: bool, format: str | None,
    calibration: str | None, samples: int, max_length: int, activations: int | None = None, compensation: bool = True, reconstruct: int = 0,
) -> "Quantization":  # fmt: skip
    from qzo.model.gptq_format import BITS, GptqConfig

    wrong = None
    if method not in METHODS:
        raise BadInput("method", method, ", ".join(METHODS))
    if method == "zeroqat":
        return _latent(bits, group_size, activations, compensation, reconstruct, sym, desc_act, format, calibration, samples, max_length)
    if activations is not None:
        raise BadInput("activations", f"{activations} with method {method}", "method zeroqat, which has a quantizer for them",
                       "Leave it out: the recipe key activations rounds the inputs of any uniform checkpoint.")  # fmt: skip
    if not compensation:
        raise BadInput("compensation", f"false with method {method}", "method zeroqat, whose latents may be left as they are", "Leave it out.")
    if reconstruct:
        raise BadInput("reconstruct", f"{reconstruct} with method {method}", "method zeroqat, which has a quantizer to move", "Leave it out.")
    sym = sym is not False
    if method not in ("gptq", "rtn"):
        return _of_library(method, bits, group_size, sym, desc_act, format)
    bits, group_size, format = (4 if bits is None else bits), (128 if group_size is None else group_size), format or "gptq"
    if bits not in BITS:
        wrong = ("bits", str(bits), "2, 3, 4 or 8")
    elif group_size != -1 and group_size < 1:
        wrong = ("group_size", str(group_size), "a positive whole number, or -1 for whole rows")
    elif format not in FORMATS:
        wrong = ("format", format, " or ".join(FORMATS))
    if wrong:
        raise BadInput(*wrong)
    _check_windows(samples, max_length)
    if method == "gptq" and calibration is None:
        raise BadInput("calibration", "none", "text for method gptq", "Give --calibration FILE, or --method rtn.")
    if method == "rtn" and desc_act:
        raise BadInput("desc_act", "true with method rtn", "method gptq: the order comes from its calibration")
    return GptqConfig(bits, group_size, sym, desc_act, format)


def _check_windows(samples: int, max_length: int) -> None:
    if samples < 1 or max_length < 2:
        raise BadInput("samples, max_length", f"{samples}, {max_length}", "at least 1 window of at least 2 tokens")


def _latent(
    bits: int | None, group_size: int | None, activations: int | None, compensation: bool, reconstruct: int, sym: bool | None,
    desc_act: bool, format: str | None, calibration: str | None, samples: int, max_length: int,
) -> "Quantization":  # fmt: skip
    from qzo.quantize.compensate import BITS as COMPENSATED
    from qzo.quantize.zeroqat import settings

    one = "method gptq or rtn: a latent checkpoint has one format, a zero point per group and columns in order"
    for key, given in (("sym", None if sym is None else str(sym).lower()), ("desc_act", desc_act and "true"), ("format", format)):
        if given:
            raise BadInput(key, f"{given} with method zeroqat", one, "Leave it out.")
    found = settings(bits, group_size, activations)
    _check_windows(samples, max_length)
    if calibration is None:
        raise BadInput("calibration", "none", "text for method zeroqat", "Give --calibration FILE.")
    if reconstruct < 0:
        raise BadInput("reconstruct", str(reconstruct), "a number of epochs, 0 for none")
    return replace(found, compensation=compensation and found.bits in COMPENSATED, reconstruction=reconstruct)


def _of_library(method: str, bits: int | None, block: int | None, sym: bool, desc_act: bool, format: str | None) -> "Quantization":
    from qzo.quantize.bnb import settings

    for key, given, right in (("sym", "false", sym), ("desc_act", "true", not desc_act), ("format", format, format is None)):
        if not right:
            raise BadInput(key, f"{given} with method {method}", "method gptq or rtn: bitsandbytes has one format and no such setting")
    return settings(method, bits, block)


def _check_model(folder: "Folder", network: "nn.Module", config: "Quantization") -> list[str]:
    """The full names of the Linears to quantize. Raises BadInput for what the quantizer or the format does not take."""
    from torch import nn

    from qzo.model.formats import read_config
    from qzo.model.zeroqat_format import latent_config
    from qzo.quantize.inputs import decoder_layers

    if read_config(folder) is not None or latent_config(folder) is not None:
        raise BadInput(str(folder.path), "already quantized", "a 16-bit model", "Quantize the model that it was made from.")
    names = []
    for name, module in decoder_layers(network)[1].named_modules(prefix=decoder_layers(network)[0]):
        if isinstance(module, nn.Linear):
            names.append(name)
            sizes = (module.out_features, module.in_features)
            if config.bits == 3 and any(size % 32 for size in sizes):
                raise BadInput(name, f"a weight of {sizes[0]}×{sizes[1]}", "multiples of 32 at 3 bits (3 words hold 32 codes)",
                               "Use 2, 4 or 8 bits.")  # fmt: skip
            if config.codebook and sizes[1] % config.group_size:
                raise BadInput(name, f"rows of {sizes[1]}", f"whole blocks of {config.group_size}: one scale must not be of two rows",
                               "Use a smaller group_size, or method gptq, rtn or int8.")  # fmt: skip
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            raise BadInput(name, f"weights in a {type(module).__name__}", "decoder layers whose weights are in Linears")
    for name, parameter in network.named_parameters():
        if name not in folder:
            raise BadInput(str(folder.path), f"no tensor {name}", "every tensor of the model", "The checkpoint is incomplete.")
        if folder.shape(name) != tuple(parameter.shape):
            raise BadInput(f"{folder.path}, {name}", f"shape {list(folder.shape(name))}", f"{list(parameter.shape)}")
    return names


def _copy_rest(folder: "Folder", network: "nn.Module", quantized: list[str], writer: "FolderWriter") -> None:
    """Every other tensor under the model's own name for it, in its own dtype."""
    known = network.state_dict().keys()
    done = {f"{name}.weight" for name in quantized}
    for stored in folder.tensors:
        name = f"model.{stored}" if stored not in known and f"model.{stored}" in known else stored
        if name not in done:
            writer.add(name, folder.read(stored))


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
