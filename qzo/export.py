"""A run out of its folder, as a model folder: an ordinary GPTQ checkpoint, or dequantized 16-bit weights.

The base checkpoint is copied tensor by tensor; only scales (and norms and biases, where they were tuned) are new.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qzo.data.encode import leading_ids
from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.gptq_format import GptqConfig, pack_layer, pack_zeros, read_config, read_layer, unpack_zeros
from qzo.model.linear import QuantLinear
from qzo.model.load import load_model, pick_device, skeleton
from qzo.model.save import FolderWriter
from qzo.peft_export import ADAPTER, write_peft
from qzo.progress import Progress
from qzo.rebuild import load_run, tuned_state
from qzo.run import read_run, recipe_of, steps_to

FORMATS = ("gptq", "gptq_v2", "hf", "peft")
PROBE = "The quick brown fox jumps over the lazy dog. It was"


def export_run(run: str, out: str, format: str | None = None, to: int | None = None, snapshots: bool = True) -> dict:
    """Write the tuned model of `run` (after `to` steps; default: all) to the new folder `out`.

    format: gptq | gptq_v2 | hf; default: the base checkpoint's own; of a run whose adapters moved peft, and no other. Returns the steps,
    the state and what rounding the scales to fp16 changed. Raises BadInput for a zero point that gptq (v1) cannot hold.
    """
    header, records = read_run(run)
    steps = steps_to(run, records, to)
    folder = Folder(header["base"]["model"])
    config = read_config(folder)
    adapters = header["groups"][0]["name"] == "lora"
    format = format or ("peft" if adapters else config.version)
    if format not in FORMATS or (format == "peft") != adapters:
        raise BadInput("--format", format, "peft, for adapters were tuned" if adapters else f"one of {', '.join(FORMATS[:-1])}")
    if adapters:
        state, recipe = tuned_state(run, folder, torch.device("cpu"), steps, snapshots)[1], recipe_of(header, run)
        write_peft(out, state, recipe.model, recipe.lora_rank, recipe.lora_alpha, recipe.lora_layers)
        return {"steps": steps, "out": str(out), "format": format, "rounding": 0.0, "state": state}
    with FolderWriter(out) as writer, Progress("export", len(folder.tensors)) as progress:
        _, state = tuned_state(run, folder, torch.device("cpu"), steps, snapshots)
        if format == "hf":
            _write_dense(folder, config, state, writer, progress)
        else:
            cols = {tensor["name"]: tensor["shape"][1] for group in header["groups"] for tensor in group["tensors"]}
            _write_gptq(folder, config, format, state, cols, writer, progress)
    return {"steps": steps, "out": str(out), "format": format, "rounding": _rounding(state), "state": state}


def _rounded(folder: Folder, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as a GPTQ checkpoint holds it: scales in fp16, the others in the base checkpoint's dtype."""
    rounded = {}
    for name, value in state.items():
        tensor, _, kind = name.rpartition("/")
        if not value.is_floating_point():
            rounded[name] = value
            continue
        rounded[name] = value.to(torch.float16 if kind == "scales" else folder.read(tensor).dtype)
        if not bool(torch.isfinite(rounded[name]).all()):
            raise RunFailed(name, f"a tuned value beyond the range of {rounded[name].dtype}", "smaller values", "Tune with a lower lr.")
    return rounded


def _tuned(state: dict[str, Any], name: str) -> Any:
    """The tuned tensor of a stored one; base-model checkpoints leave out the leading `model.` of the model's names."""
    return state.get(name, state.get(f"model.{name}"))


def _write_gptq(
    folder: Folder, config: GptqConfig, version: str, state: dict[str, torch.Tensor], cols: dict[str, int], writer: FolderWriter,
    progress: Progress,
) -> None:  # fmt: skip
    """`cols`: columns of the tensors that moved, by name."""
    target = dataclasses.replace(config, version=version)
    rounded = _rounded(folder, state)
    for number, name in enumerate(folder.tensors):
        value = folder.read(name)
        module, _, kind = name.rpartition(".")
        if kind == "scales" and (tuned := _tuned(rounded, f"{module}/scales")) is not None:
            value = tuned.t()
        elif kind == "qweight" and (tuned := _tuned(rounded, f"{module}/codes")) is not None:
            value = pack_layer(tuned, folder, module, config, _tuned(cols, f"{module}/codes"))
        elif kind == "qzeros" and version != config.version:
            rows = folder.shape(f"{module}.scales")[1]
            value = pack_zeros(unpack_zeros(value, config, rows), target, name)
        else:
            tuned = _tuned(rounded, f"{name}/dense")
            value = value if tuned is None else tuned[0]
        writer.add(name, value)
        progress.update(number + 1)
    raw = folder.config.get("quantization_config") or folder.read_json("quantize_config.json")
    raw = {**target.to_dict(), **raw, "checkpoint_format": version}
    raw.update({key: value for key, value in (("format", version), ("version", 1 + target.v2)) if key in raw})
    folder.copy_side_files(writer.partial)
    writer.finish({**folder.config, "quantization_config": raw}, {"quantize_config.json": raw})


def _write_dense(folder: Folder, config: GptqConfig, state: dict[str, torch.Tensor], writer: FolderWriter, progress: Progress) -> None:
    parts = ("qweight", "qzeros", "scales", "g_idx")
    modules = dict(skeleton(folder).named_modules())
    for number, name in enumerate(folder.tensors):
        module, _, kind = name.rpartition(".")
        if kind == "scales" and f"{module}.qweight" in folder:
            linear = modules.get(module) or modules[f"model.{module}"]
            cols = linear.in_features
            tensors = read_layer(folder, module, config, linear.out_features, cols)
            scales, codes = (_tuned(state, f"{module}/{kind}") for kind in ("scales", "codes"))
            tensors.scales = tensors.scales if scales is None else scales
            tensors.codes = tensors.codes if codes is None else codes
            layer = QuantLinear(module, tensors, config.bits, config.group(cols), cols)
            writer.add(f"{module}.weight", layer.weight(torch.float16))
        elif kind not in parts:
            tuned = _tuned(state, f"{name}/dense")
            writer.add(name, folder.read(name) if tuned is None else tuned[0].to(torch.float16))
        progress.update(number + 1)
    folder.copy_side_files(writer.partial)
    plain = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    writer.finish({**plain, "dtype": "float16"})


def _rounding(state: dict[str, torch.Tensor]) -> float:
    """The largest relative change of a scale by its cast to fp16."""
    worst = 0.0
    for name, value in state.items():
        if name.endswith("/scales"):
            change = (value.half().float() - value).abs() / value.abs().clamp(min=1e-12)
            worst = max(worst, float(change.max()))
    return worst


def verify(run: str, out: str, to: int | None = None, device: str = "auto") -> dict:
    """Load `out` afresh and compare its logits with the run's own on a probe text.

    A GPTQ folder must equal the run with its scales rounded to fp16, bit for bit (RunFailed otherwise); also returns
    the largest difference to the run with fp32 scales, `rounding_difference`, beside the largest logit. An adapter for peft must
    hold the run's tensors; {} then.
    """
    where = pick_device(device)
    if (Path(out) / ADAPTER).exists():
        _, state = tuned_state(run, Folder(read_run(run)[0]["base"]["model"]), torch.device("cpu"), to)
        written = load_file(Path(out) / ADAPTER)
        if sorted(t.numpy().tobytes() for t in written.values()) != sorted(t.numpy().tobytes() for t in state.values()):
            raise RunFailed(out, "tensors that differ from the run's", "equal ones", "Please report this.")
        return {}
    loaded, targets, _ = load_run(run, device, to=to)
    ids = _probe(loaded)
    tuned = _logits(loaded.model, ids)
    for target in targets:
        target.load_state(_rounded(loaded.folder, target.state()))
    rounded = _logits(loaded.model, ids)
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[loaded.dtype]
    recipe = recipe_of(read_run(run)[0], run)
    del loaded, targets, target
    written = load_model(out, where.type, dtype, recipe.offload, recipe.activations)
    logits = _logits(written.model, ids)
    exact = bool(torch.equal(logits, rounded))
    if written.layers and not exact:
        difference = float((logits - rounded).abs().max())
        raise RunFailed(out, f"logits differ by {difference:.3g} from the run's", "equal logits", "Please report this.")
    return {
        "equal": exact, "largest_logit": float(tuned.abs().max()),
        "rounding_difference": float((logits - tuned).abs().max()),
    }  # fmt: skip


def _probe(loaded) -> torch.Tensor:
    try:
        tokenizer = loaded.tokenizer()
        ids = [*leading_ids(tokenizer), *tokenizer(PROBE, add_special_tokens=False)["input_ids"]]
    except BadInput:
        ids = list(range(1, 17))
    return torch.tensor([ids], device=loaded.device) % loaded.model.config.vocab_size


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().cpu()
