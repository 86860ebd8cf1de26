"""A run out of its folder, as a model folder: an ordinary checkpoint of the base model's format, or dequantized 16-bit weights.
Runs of ZeroQAT, and latent checkpoints themselves: latent_export.py.

The base checkpoint is copied tensor by tensor; only scales (and norms and biases, where they were tuned) are new.
"""

from pathlib import Path
from typing import Any

import torch
from qzo_kernels.pack import untile_codes
from safetensors.torch import load_file

from qzo.card import model_card
from qzo.data.encode import leading_ids
from qzo.errors import BadInput, RunFailed
from qzo.latent_export import is_latent, load_latent_source, verify_folder, write_folder
from qzo.model.files import Folder
from qzo.model.formats import Quantization, format_of, part_of, read_config
from qzo.model.linear import QuantLinear
from qzo.model.load import load_model, pick_device, skeleton
from qzo.model.save import FolderWriter
from qzo.model.uniform import Moved
from qzo.peft_export import ADAPTER, write_peft
from qzo.progress import Progress
from qzo.rebuild import load_run, tuned_state
from qzo.run import is_run, read_run, recipe_of, steps_to

PROBE = "The quick brown fox jumps over the lazy dog. It was"


def export_run(
    run: str, out: str, format: str | None = None, to: int | None = None, snapshots: bool = True, repo: str | None = None
) -> dict:
    """Write the tuned model of `run` (after `to` steps; default: all) to the new folder `out`, with a model card (repo: the hub id it will have).

    format: hf, or one that the base checkpoint's format can be written as (gptq and gptq_v2; otherwise its own); default:
    its own; for a run whose adapters moved peft, and no other. A run of ZeroQAT, or the folder of a latent checkpoint in place of a run, is
    written packed, as gptq_v2 or zeroqat (latent_export.py). Returns the steps, the state and what rounding the scales changed. Raises BadInput for another format, and for
    a zero point that gptq (v1) cannot hold.
    """
    if is_latent(run):
        return _export_latent(run, out, format or "packed", to, snapshots, repo)
    header, records = read_run(run)
    steps = steps_to(run, records, to)
    folder = Folder(header["base"]["model"])
    config = read_config(folder)
    adapters = header["groups"][0]["name"] == "lora"
    # Smoothing and grids of activations have no place in plain weights.
    known = ("peft",) if adapters else (*format_of(config).VERSIONS, *(() if config.version == "packed" else ("hf",)))
    format = format or ("peft" if adapters else config.version)
    if format not in known:
        raise BadInput("--format", format, f"one of {', '.join(known)}", "This model's codes are kept in the layout that they have.")
    card = model_card(run, header, folder, repo, format, steps)
    if adapters:
        state, recipe = tuned_state(run, folder, torch.device("cpu"), steps, snapshots)[1], recipe_of(header, run)
        write_peft(out, state, recipe.model, recipe.lora_rank, recipe.lora_alpha, recipe.lora_layers, card)
        return {"steps": steps, "out": str(out), "format": format, "state": state}
    with FolderWriter(out) as writer, Progress("export", len(folder.tensors)) as progress:
        _, state = tuned_state(run, folder, torch.device("cpu"), steps, snapshots)
        writer.write_text("README.md", card)
        if format == "hf":
            _write_dense(folder, config, state, writer, progress)
        else:
            cols = {tensor["name"]: tensor["shape"][1] for group in header["groups"] for tensor in group["tensors"]}
            _write_quantized(folder, config, format, state, cols, writer, progress)
    scales, worst = _rounding(folder, config, state)
    return {"steps": steps, "out": str(out), "format": format, "rounding": worst, "scales": scales, "state": state}


def _export_latent(run: str, out: str, format: str, to: int | None, snapshots: bool, repo: str | None) -> dict:
    loaded, steps = load_latent_source(run, to, snapshots)
    card = model_card(run, read_run(run)[0], loaded.folder, repo, format, steps) if is_run(run) else None
    write_folder(loaded, out, format, card)
    return {"steps": steps, "out": str(out), "format": format, "rounding": 0.0, "scales": "", "state": {}}


def _rounded(folder: Folder, config: Quantization, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as a quantized checkpoint holds it: scales as its format holds them, the others in the base checkpoint's."""
    rounded = {}
    for name, value in state.items():
        tensor, _, kind = name.rpartition("/")
        if not value.is_floating_point():
            rounded[name] = value
            continue
        is_scale = kind == "scales"
        rounded[name] = format_of(config).rounded(folder, tensor, value) if is_scale else value.to(folder.read(tensor).dtype)
        if not bool(torch.isfinite(rounded[name]).all()):
            raise RunFailed(name, f"a tuned value beyond the range of {rounded[name].dtype}", "smaller values", "Tune with a lower lr.")
    return rounded


def _tuned(state: dict[str, Any], name: str) -> Any:
    """The tuned tensor of a stored one; base-model checkpoints leave out the leading `model.` of the model's names."""
    return state.get(name, state.get(f"model.{name}"))


def _write_quantized(
    folder: Folder, config: Quantization, version: str, state: dict[str, torch.Tensor], cols: dict[str, int], writer: FolderWriter,
    progress: Progress,
) -> None:  # fmt: skip
    """`cols`: columns of the tensors that moved, by name."""
    layout, rounded = format_of(config), _rounded(folder, config, state)
    for number, name in enumerate(folder.tensors):
        part = part_of(folder, name, config)
        if part is None:
            tuned = _tuned(rounded, f"{name}/dense")
            value = folder.read(name) if tuned is None else tuned[0]
        else:
            codes = _tuned(rounded, f"{part[0]}/codes")
            if codes is not None:
                codes = untile_codes(codes, config.bits, _tuned(cols, f"{part[0]}/codes")).to(torch.uint8)
            value = layout.written(folder, *part, config, version, Moved(_tuned(rounded, f"{part[0]}/scales"), codes))
        if value is not None:
            writer.add(name, value)
        progress.update(number + 1)
    quantization, extra = layout.documents(folder, config, version)
    folder.copy_side_files(writer.partial)
    writer.finish({**folder.config, "quantization_config": quantization}, extra)


def _write_dense(folder: Folder, config: Quantization, state: dict[str, torch.Tensor], writer: FolderWriter, progress: Progress) -> None:
    layout, modules = format_of(config), dict(skeleton(folder).named_modules())
    for number, name in enumerate(folder.tensors):
        part = part_of(folder, name, config)
        if part is None:
            tuned = _tuned(state, f"{name}/dense")
            writer.add(name, folder.read(name) if tuned is None else tuned[0].to(torch.float16))
        elif part[1] == layout.SCALES:
            module = part[0]
            linear = modules.get(module) or modules[f"model.{module}"]
            cols = linear.in_features
            tensors = layout.read_layer(folder, module, config, linear.out_features, cols)
            scales, codes = (_tuned(state, f"{module}/{kind}") for kind in ("scales", "codes"))
            tensors.scales = tensors.scales if scales is None else scales
            tensors.codes = tensors.codes if codes is None else codes
            layer = QuantLinear(module, tensors, config.bits, config.group(cols), cols)
            writer.add(f"{module}.weight", layer.weight(torch.float16))
        progress.update(number + 1)
    folder.copy_side_files(writer.partial)
    plain = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    writer.finish({**plain, "dtype": "float16"})


def _rounding(folder: Folder, config: Quantization, state: dict[str, torch.Tensor]) -> tuple[str, float]:
    """(the dtype of an export's scales, the largest relative change of a scale by its cast to it)."""
    worst, kinds = 0.0, set()
    for name, value in state.items():
        if name.endswith("/scales"):
            rounded = format_of(config).rounded(folder, name.removesuffix("/scales"), value)
            kinds.add({torch.float16: "fp16", torch.bfloat16: "bf16"}.get(rounded.dtype, "fp32"))
            change = (rounded.float() - value).abs() / value.abs().clamp(min=1e-12)
            worst = max(worst, float(change.max()))
    return " and ".join(sorted(kinds)), worst


def verify(run: str, out: str, to: int | None = None, device: str = "auto") -> dict:
    """Load `out` afresh and compare its logits with the run's own on a probe text.

    A quantized folder must equal the run with its scales rounded as it stores them, bit for bit (RunFailed otherwise); also returns
    the largest difference to the run with fp32 scales, `rounding_difference`, beside the largest logit. An adapter for peft must
    hold the run's tensors; {} then. Of ZeroQAT on the CPU: see latent_export.verify_folder.
    """
    if is_latent(run):
        loaded = load_latent_source(run, to)[0]
        return verify_folder(loaded, out, _written_format(out), _probe(loaded))
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
        target.load_state(_rounded(loaded.folder, loaded.config, target.state()))
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


def _written_format(out: str) -> str:
    config = read_config(Folder(out))
    return "zeroqat" if config is None else config.version


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
