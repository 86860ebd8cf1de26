"""A latent checkpoint of ZeroQAT, tuned or as it is, as a folder: packed as it is served, an ordinary GPTQ checkpoint, or latent again.

    packed    codes on the frozen grid, folded norms, one bias per Linear (model/packed_format.py)
    gptq_v2   the same codes, for weights alone without smoothing; scales in fp16
    zeroqat   latents that moved in fp32, and the quantizer. Where weights moved on a frozen grid, factor and move are such that the grid
              comes out of the moved weights: z exactly, Δ but for the last bit of fp32 where no factor gives it
"""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qzo_kernels.reference_qat import clipped_grid
from torch import Tensor, nn

from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.gptq_format import BITS, GptqConfig
from qzo.model.load import LoadedModel, load_model
from qzo.model.packed_format import document, write_linear
from qzo.model.packing import packed
from qzo.model.qat import FakeQuantLinear, FoldedNorm, quantizer_state
from qzo.model.save import FolderWriter
from qzo.model.zeroqat_format import latent_config
from qzo.progress import Progress
from qzo.rebuild import load_run
from qzo.run import is_run, read_run

FORMATS = ("packed", "gptq_v2", "zeroqat")
_GROUPS = ("latent", "quantizer")
# Of a module's output on one input, in norm, in fp32. A whole layer's: a channel that differs in its last bit may round to a neighbour, which
# on a coarse grid is far; so is a code that moved, for the output of its Linear. Logits have no such bound: over many layers these differences
# grow to the size of the quantization's own error.
TOLERANCE, ROUNDED, LAYER = 1e-4, 2e-3, 0.05
MOVED = 1e-5  # share of codes that a step which differs in its last bit may move


def is_latent(path: str) -> bool:
    """Whether this is a run of ZeroQAT, or a folder with a latent checkpoint."""
    if is_run(path):
        return any(group["name"] in _GROUPS for group in read_run(path)[0]["groups"])
    return (Path(path) / "config.json").is_file() and latent_config(Folder(path)) is not None


def load_latent_source(path: str, to: int | None = None, snapshots: bool = True) -> tuple[LoadedModel, int]:
    """(the model of such a run or folder on the CPU in fp32, the steps applied); without `snapshots` replayed from the journal alone."""
    if not is_run(path):
        if to is not None:
            raise BadInput(path, f"step {to} of a model folder", "the folder of a run")
        return load_model(path, "cpu", "fp32"), 0
    loaded, _, steps = load_run(path, "cpu", "fp32", to, snapshots)
    return loaded, steps


def write_folder(loaded: LoadedModel, out: str, format: str, card: str | None = None) -> None:
    """Write a latent checkpoint that is loaded on the CPU in fp32 to the new folder `out`; card: its README.md. Raises BadInput for a format
    that it cannot be written as."""
    _check_format(loaded, format)
    linears, folder = {**loaded.fakes, **loaded.layers}, loaded.folder
    with FolderWriter(out) as writer, Progress("export", len(folder.tensors)) as progress:
        if card:
            writer.write_text("README.md", card)
        written = set()
        for name, tensor in {"packed": _packed, "gptq_v2": _gptq, "zeroqat": _latent}[format](loaded, linears):
            writer.add(name, tensor)
            written.add(name)
            progress.update(min(len(written), len(folder.tensors) - 1))
        for stored in folder.tensors:
            names = {stored, f"model.{stored}"}  # base-model checkpoints leave out the leading `model.`
            of_quantizer = ".sites." in stored or any(name.rpartition(".")[0] in linears for name in names)
            if not names & written and (format == "zeroqat" or not of_quantizer):
                writer.add(stored, folder.read(stored))
        progress.update(len(folder.tensors))
        quantization, extra = _documents(loaded, format)
        folder.copy_side_files(writer.partial)
        writer.finish({**folder.config, "quantization_config": quantization}, extra)


def _check_format(loaded: LoadedModel, format: str) -> None:
    config = loaded.latent
    if format not in FORMATS:
        raise BadInput("--format", format, f"one of {', '.join(FORMATS)}", "A latent checkpoint is written as one of them.")
    if format == "gptq_v2":
        reasons = ((config.activations < 16, f"activations of {config.activations} bits"), (config.smoothing, "smoothing"),
                   (config.bits not in BITS, f"codes of {config.bits} bits"))  # fmt: skip
        given = next((text for holds, text in reasons if holds), None)
        if given:
            raise BadInput("--format", f"gptq_v2 with {given}", "weights alone, of 2, 3, 4 or 8 bits, without smoothing", "Use --format packed.")


def _documents(loaded: LoadedModel, format: str) -> tuple[dict[str, Any], dict[str, dict]]:
    config = loaded.latent
    if format == "zeroqat":
        return config.to_dict(), {}
    if format == "packed":
        return document(config), {}
    said = GptqConfig(config.bits, config.group_size, False, False, "gptq_v2").to_dict()
    return said, {"quantize_config.json": said}


def _packed(loaded: LoadedModel, linears: dict) -> Iterator[tuple[str, Tensor]]:
    for name, module in loaded.model.named_modules():
        if name in linears:
            yield from ((f"{name}.{part}", tensor) for part, tensor in write_linear(packed(module), loaded.latent.bits).items())
        elif isinstance(module, FoldedNorm):
            weight, bias = module.folded()
            yield f"{name}.weight", weight
            if bias is not None:
                yield f"{name}.bias", bias


def _gptq(loaded: LoadedModel, linears: dict) -> Iterator[tuple[str, Tensor]]:
    for name, module in linears.items():
        found, size = packed(module), loaded.latent.group(module.in_features)
        parts = write_linear(found, loaded.latent.bits)
        if not bool(parts["scales"].half().isfinite().all()):
            raise RunFailed(f"{name}.scales", "a step beyond the range of fp16", "smaller steps", "Use --format packed, which holds fp32.")
        yield f"{name}.qweight", parts["qweight"]
        yield f"{name}.qzeros", parts["qzeros"]
        yield f"{name}.scales", parts["scales"].half()
        yield f"{name}.g_idx", torch.arange(module.in_features, dtype=torch.int32) // size
        if f"{name}.bias" in loaded.folder:
            yield f"{name}.bias", loaded.folder.read(f"{name}.bias")


def _latent(loaded: LoadedModel, linears: dict) -> Iterator[tuple[str, Tensor]]:
    for name, layer in loaded.model.named_modules():
        if hasattr(layer, "sites"):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in quantizer_state(layer).items() if not inner.endswith((".factor", ".move")))
    for name, fake in loaded.fakes.items():
        factor, move = regrid(fake)
        yield f"{name}.weight", fake.weight.data
        yield f"{name}.factor", factor
        yield f"{name}.move", move


def regrid(fake: FakeQuantLinear) -> tuple[Tensor, Tensor]:
    """(factor, move) fp32 [N, G] for which a layer's grid, made of its weights as they are now, is the frozen one that it has."""
    step, zero = fake.grid()
    factor, move = fake.factor.data, fake.move.data
    if torch.equal(step, fake.step) and torch.equal(zero, fake.zero):
        return factor, move
    size = fake.precision.group_size
    step, zero = clipped_grid(fake.smoothed(), fake.precision.bits, size, fake.low.data, fake.high.data)
    best = fake.step / step
    for sign in (1, -1):
        other = torch.nextafter(best, torch.full_like(best, sign * float("inf")))
        best = torch.where((step * other - fake.step).abs() < (step * best - fake.step).abs(), other, best)
    return best, fake.zero - zero


def verify_folder(loaded: LoadedModel, out: str, format: str, ids: Tensor) -> dict[str, Any]:
    """Read `out` again and compare it with the model that it was made of, loaded as for `write_folder`; ids int64 [1, T] are a probe.

    Codes, steps and zeros must be equal (scales of gptq_v2 rounded to fp16; of zeroqat MOVED of the codes may differ). On the inputs that
    the model itself gives them, outputs of Linears, norms, embeddings and head must be within TOLERANCE in norm (ROUNDED for gptq_v2), of
    whole layers, and of Linears in which a code differs, within LAYER; RunFailed otherwise. Returns {format, codes: share that differs,
    parts, layers: the largest ‖a - b‖/‖b‖, apart: that of the logits, said: all that in a line}.
    """
    written = load_model(out, "cpu", "fp32")
    ours, theirs, count, moved = {**loaded.fakes, **loaded.layers}, {**written.fakes, **written.layers}, 0, {}
    for name, module in ours.items():
        a, b = packed(module), packed(theirs[name])
        different = int((a.codes != b.codes).sum())
        step = a.step.half().float() if format == "gptq_v2" else a.step
        count, moved = count + a.codes.numel(), moved | ({name: different} if different else {})
        if not torch.equal(a.zero, b.zero) or format != "zeroqat" and (different or not torch.equal(step, b.step)):
            raise RunFailed(f"{out}, {name}", "codes, steps or zeros that differ from the model's", "equal ones", "Please report this.")
    differ = sum(moved.values())
    if differ > MOVED * count:
        raise RunFailed(out, f"{differ} of {count} codes that differ from the model's", f"at most {MOVED} of them", "Please report this.")
    bounds = {"parts": ROUNDED if format == "gptq_v2" else TOLERANCE, "layers": LAYER}
    found, expected = _beside(loaded, written, ids, moved)
    for kind, (name, distance) in found.items():
        if not distance <= bounds[kind]:
            raise RunFailed(f"{out}, {name}", f"an output that differs by {distance:.3g} in norm", f"at most {bounds[kind]}", "Please report this.")
    distances = {kind: distance for kind, (_, distance) in found.items()}
    apart = _distance(_logits(written, ids), expected)
    said = f"codes equal{f' but for {differ} of {count}' if differ else ''}; on one input outputs of parts differ by {distances['parts']:.2g} in norm at most, "
    said += f"of layers by {distances['layers']:.2g}; logits by {apart:.2g}"
    return {"format": format, "codes": differ / count, **distances, "apart": apart, "said": said}


def _beside(loaded: LoadedModel, written: LoadedModel, ids: Tensor, moved: Collection[str]) -> tuple[dict[str, tuple[str, float]], Tensor]:
    """(the module of the largest distance and that distance, among parts and among layers with the Linears in `moved`; the model's logits)."""
    others, layers = dict(written.model.named_modules()), set(loaded.model.get_decoder().layers)
    found, handles = {"parts": ("", 0.0), "layers": ("", 0.0)}, []

    def compare(name: str, kind: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        a, b = (value[0] if isinstance(value, tuple) else value for value in (others[name](*args, **kwargs), output))
        distance = _distance(a, b)
        if not distance <= found[kind][1]:
            found[kind] = (name, distance)

    for name, module in loaded.model.named_modules():
        kind = "layers" if module in layers or name in moved else "parts"
        if module in layers or next(module.children(), None) is None and next(module.parameters(), None) is not None:
            handles.append(module.register_forward_hook(partial(compare, name, kind), with_kwargs=True))
    expected = _logits(loaded, ids)
    for handle in handles:
        handle.remove()
    return found, expected


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@torch.no_grad()
def _logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    return loaded.model(input_ids=ids, use_cache=False).logits.float()
