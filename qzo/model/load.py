"""A model folder in, a transformers model with QuantLinear out; tensor by tensor, never the 16-bit model of a 4-bit one."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qzo.errors import BadInput
from qzo.model.embedding import HostEmbedding
from qzo.model.files import Folder, one_line
from qzo.model.formats import Quantization, format_of, is_quantized, read_config
from qzo.model.latent_stream import stream_latents
from qzo.model.linear import QuantLinear, Scratch
from qzo.model.packed_format import PackedConfig, prepare_model
from qzo.model.qat import FakeQuantLinear
from qzo.model.stream import LayerStream, stream_codes
from qzo.model.zeroqat_format import LatentConfig, latent_config
from qzo.progress import Progress

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class LoadedModel:
    """`layers` maps module names to the QuantLinears (empty for a 16-bit folder); `config` is the folder's quantization.

    Of a latent checkpoint of ZeroQAT `latent` is what its config says, `fakes` its FakeQuantLinears by name, and `config` None.
    `stream` brings the codes, or the latents, to a GPU where they are kept in host memory.
    """

    model: nn.Module
    folder: Folder
    config: Quantization | None
    layers: dict[str, QuantLinear]
    device: torch.device
    dtype: torch.dtype
    embedding: HostEmbedding | None = None
    stream: LayerStream | None = None
    fakes: dict[str, FakeQuantLinear] = field(default_factory=dict)
    latent: LatentConfig | None = None

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    def rest(self) -> None:
        """The state in which a forward may be captured or replayed as a graph: see LayerStream."""
        if self.stream is not None:
            self.stream.rest()


def pick_device(device: str) -> torch.device:
    """auto | cpu | cuda -> the device. Raises BadInput for cuda where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device", "cuda", "a CUDA device that PyTorch sees", "Use device=cpu, or see `qzo doctor`.")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto is bf16 on a GPU and on CPUs that multiply it natively, else fp32."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(folder: Folder) -> Any:
    """The folder's tokenizer. Raises BadInput when it has none that can be read."""
    from transformers import AutoTokenizer

    if not any(folder.path.glob("tokenizer*")) and not any(folder.path.glob("vocab*")):
        raise BadInput(str(folder.path), "no tokenizer files", "tokenizer.json beside the weights",
                       "Copy the tokenizer's files of the original model into the folder.")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise nothing narrower for a damaged file
        raise BadInput(f"{folder.path}, tokenizer", one_line(error), "a transformers tokenizer without code of its own") from error
    size = folder.config.get("vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > size:
        raise BadInput(f"{folder.path}, tokenizer", f"a vocabulary of {tokenizer.vocab_size}", f"at most the model's {size}",
                       "Use the tokenizer that the model was trained with.")  # fmt: skip
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return tokenizer


def skeleton(folder: Folder) -> nn.Module:
    """The transformers model of a folder, its parameters on meta. Raises BadInput for a family not supported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    family = folder.config.get("model_type")
    if family not in FAMILIES:
        raise BadInput(f"{folder.path}/config.json", f"model_type {family!r}", f"one of {', '.join(FAMILIES)}",
                       "This version does not know the modules of other models.")  # fmt: skip
    if "auto_map" in folder.config:
        raise BadInput(f"{folder.path}/config.json", "auto_map: code of the model's own", "a model that transformers itself knows",
                       "Code from a model folder is never run.")  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RuntimeError, StrictDataclassError) as error:
        raise BadInput(f"{folder.path}/config.json", one_line(error), "a config of transformers") from error
    return model.eval().requires_grad_(False)


def _computed_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): transformers computes them when it initializes a module."""
    for module in model.modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        if any(module._buffers[n].is_meta for n in names):
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
            for name in names:
                module._buffers[name] = module._buffers[name].to(device)


def _read(folder: Folder, name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor of the folder. Raises BadInput where it is missing or has another shape."""
    value = folder.read(name)
    if value.shape != shape:
        raise BadInput(f"{folder.path}, {name}", f"shape {list(value.shape)}", f"{list(shape)}")
    return value


def fill(
    model: nn.Module, folder: Folder, device: torch.device, dtype: torch.dtype, prefix: str = "", exact: type[nn.Module] | tuple[()] = ()
) -> None:
    """Read the parameters below `prefix` that are still on meta; those of modules of the type `exact` keep the folder's dtype.

    Raises BadInput for missing or misshapen tensors, and for integers.
    """
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    for module_name, module in model.named_modules():
        if not f"{module_name}.".startswith(prefix) or isinstance(module, QuantLinear) or module is tied:
            continue
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None or not old.is_meta or name in module._non_persistent_buffers_set:
                    continue
                value = _read(folder, f"{module_name}.{name}", old.shape)
                if old.is_floating_point() and not value.is_floating_point():
                    raise BadInput(f"{folder.path}, {module_name}.{name}", f"{value.dtype}, and no scales", "floating-point weights",
                                   "The checkpoint is incomplete.")  # fmt: skip
                plain = value.is_floating_point() and not isinstance(module, exact)
                value = value.to(device, dtype if plain else value.dtype, copy=True)
                store[name] = nn.Parameter(value, requires_grad=False) if store is module._parameters else value
    if tied is not None:
        tied.weight = model.get_input_embeddings().weight


def release(module: nn.Module) -> None:
    """Give a module's memory back: its parameters return to meta."""
    module.to("meta")


def _check_parts(folder: Folder, names: list[str], known: set[str]) -> None:
    """Raises BadInput for a tensor of a quantized Linear that its format, as it is understood here, does not have."""
    modules = {*names, *(name.removeprefix("model.") for name in names)}
    for tensor in folder.tensors:
        module, _, part = tensor.rpartition(".")
        if module in modules and part not in known:
            raise BadInput(f"{folder.path}, {tensor}", "a tensor that this version does not know", ", ".join(sorted(known)),
                           "The checkpoint may need a newer qzo.")  # fmt: skip


def swap_quantized(
    model: nn.Module, folder: Folder, config: Quantization, device: torch.device, dtype: torch.dtype, offload: bool = False
) -> dict[str, QuantLinear]:
    """The QuantLinears by name, in their places. With `offload` the codes of the decoder layers stay on the CPU."""
    layout = format_of(config)
    scratch, layers, inside = Scratch(), {}, set(model.get_decoder().layers.modules()) if offload else ()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(folder, n, config)]
    progress = Progress("load", len(linears), after=2.0)
    for number, (name, module) in enumerate(linears):
        rows, cols = module.out_features, module.in_features
        tensors = layout.read_layer(folder, name, config, rows, cols, device)
        if module in inside:
            tensors.codes = tensors.codes.cpu()
        bias = None
        if f"{name}.bias" in folder:
            stored = _read(folder, f"{name}.bias", torch.Size([rows]))
            # Some packers write a bias of zeros for layers that have none.
            if module.bias is not None or bool(stored.any()):
                bias = stored.to(device, dtype, copy=True)
        elif module.bias is not None:
            raise BadInput(f"{folder.path}, {name}.bias", "no such tensor", f"[{rows}]: config.json gives the layer a bias")
        layer = QuantLinear(name, tensors, config.bits, config.group(cols), cols, bias, scratch)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers[name] = layer
        progress.update(number + 1)
    progress.close()
    _check_parts(folder, [*layers], {*layout.PARTS, "bias"})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what unpacking took
    if not layers:
        raise BadInput(str(folder.path), "a quantization config and no quantized tensor", ", ".join(layout.PARTS))
    return layers


def _keep_embeddings(model: nn.Module, folder: Folder, device: torch.device, dtype: torch.dtype) -> HostEmbedding:
    """Put the token embeddings into host memory. Raises BadInput where the head is the same tensor."""
    old = model.get_input_embeddings()
    if model.config.tie_word_embeddings:
        raise BadInput("offload", "embeddings that the head of this model shares", "a head of its own", "Use offload=none.")
    name = next(name for name, module in model.named_modules() if module is old)
    value = _read(folder, f"{name}.weight", old.weight.shape)
    model.set_input_embeddings(kept := HostEmbedding(value.to(dtype, copy=True), device))
    return kept


def _apart(device: torch.device) -> bool:
    """Whether the device's memory is not the host's."""
    return device.type == "cuda"


def _check_request(
    folder: Folder, config: Quantization | None, activations: str | None, latent_layers: Collection[str] | None
) -> LatentConfig | None:  # fmt: skip
    """The config of a latent checkpoint. Raises BadInput for what does not go with the folder."""
    latent = latent_config(folder)
    if activations and config is not None and config.codebook:
        raise BadInput("activations", f"{activations} with NF4, FP4 or AQLM weights", "weights on a uniform grid, or activations of 16 bits")
    own = latent.activations if latent else getattr(config, "activations", 16)
    if activations and (latent or own < 16):
        raise BadInput("activations", f"{activations} with a checkpoint that says {own} bits itself", "none", "Leave activations out.")
    if latent_layers is not None and not latent:
        raise BadInput("latent_layers", ", ".join(latent_layers) or "none", "a latent checkpoint, of qzo quantize --method zeroqat")
    return latent


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", offload: str = "none", activations: str | None = None,
    latent_layers: Collection[str] | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a 16-bit or quantized folder, a hub id or `builtin:NAME` for inference.

    Scales come as fp32 parameters, codes packed, everything else in `dtype` (auto | bf16 | fp16 | fp32). offload: what stays in host
    memory: none; embeddings; or codes (latents of a latent checkpoint, as fp32 then), of which a GPU holds those of two decoder layers, and
    embeddings that the head does not share.
    activations: int8 or fp8, the inputs of quantized Linears rounded to 8 bits. latent_layers: of a latent checkpoint, the last names of
    the Linears that stay FakeQuantLinears (None: all); the others are packed into QuantLinears, layer by layer, their smoothing as it is.
    Raises BadInput for what cannot be read, by name.
    """
    folder = Folder(name)
    config = read_config(folder)
    latent = _check_request(folder, config, activations, latent_layers)
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    model, streamed = skeleton(folder), offload if offload in ("codes", "latents") and _apart(where) else None
    if isinstance(config, PackedConfig):
        prepare_model(model, folder, config)
    layers = swap_quantized(model, folder, config, where, kind, streamed == "codes") if config else {}
    kept = offload == "embeddings" or offload != "none" and not model.config.tie_word_embeddings
    embedding = _keep_embeddings(model, folder, where, kind) if kept else None
    fakes = {}
    if latent:
        from qzo.model.latent import load_latent

        fakes, layers = load_latent(model, folder, latent, where, kind, latent_layers, streamed == "latents")
    fill(model, folder, where, kind)
    _computed_buffers(model, where)
    for layer in layers.values():
        layer.activations = activations
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise BadInput(str(folder.path), f"no tensor {left[0]}", "every tensor of the model")
    model.config.use_cache = False
    if config:
        from qzo.model.pretrained import attach

        attach(model, folder)
    stream = {"codes": stream_codes, "latents": stream_latents}[streamed](model, where) if streamed else None
    return LoadedModel(model, folder, config, layers, where, kind, embedding, stream, fakes, latent)
