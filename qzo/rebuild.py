"""The tuned tensors of a run: what moves, as the base model holds it, and after the recorded steps, without a forward."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from qzo_kernels import ops, ops_codes

from qzo.checkpoint import newest_snapshot
from qzo.errors import BadInput
from qzo.journal import Record
from qzo.model.files import Folder
from qzo.model.formats import format_of, read_config, stored_scales
from qzo.model.latent import prepared_layers
from qzo.model.load import LoadedModel, load_model, release, skeleton
from qzo.model.zeroqat_format import latent_config
from qzo.recipe import Recipe
from qzo.run import check_base, is_run, read_run, recipe_of, steps_to
from qzo.zo.noise import tensor_name
from qzo.zo.targets import Target
from qzo.zo.targets.codes import Codes, residual_name
from qzo.zo.targets.dense import Dense
from qzo.zo.targets.latent import Latent, Units, move_, units_of
from qzo.zo.targets.lora import Lora, initial, replay_
from qzo.zo.targets.quantizer import Quantizer, shift_quantizer_
from qzo.zo.targets.scales import Scales

REPLAY_CHUNK = 64
Progress = Callable[[int, int], None]


def load_base(recipe: Recipe, device: str, dtype: str) -> LoadedModel:
    """The model of a recipe, before anything moved. Without weights that move none is packed: the quantizer has them all."""
    return load_model(recipe.model, device, dtype, recipe.offload, recipe.activations, recipe.latent_layers or None)


def build_targets(recipe: Recipe, loaded: LoadedModel) -> list[Target]:
    """What moves in this run, in the order of the journal's coefficients."""
    if recipe.method == "quzo-lora":
        return [_adapters(recipe, loaded)]
    if recipe.method == "quzo":
        return [Codes(loaded.layers, recipe.eps, recipe.lr, recipe.noise_bits, recipe.estimator, recipe.feedback)]
    gaussian = recipe.noise == "gaussian"
    if recipe.method == "zeroqat":
        return _latents(recipe, loaded, gaussian)
    targets: list[Target] = [Scales(loaded.layers, recipe.eps, recipe.lr, recipe.eps_mode == "relative", gaussian)]
    if recipe.dense:
        targets.append(Dense(loaded.model, loaded.folder.read, recipe.dense_eps, recipe.dense_lr, gaussian))
    return targets


def _adapters(recipe: Recipe, loaded: LoadedModel) -> Lora:
    try:
        return Lora(loaded.layers, recipe.seed, recipe.eps, recipe.lr, recipe.lora_rank, recipe.lora_alpha, recipe.noise_bits,
                    recipe.estimator, recipe.lora_layers)  # fmt: skip
    except ValueError as error:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in loaded.layers}))
        raise BadInput("lora_layers", ", ".join(recipe.lora_layers), f"some of {known}") from error


def _latents(recipe: Recipe, loaded: LoadedModel, gaussian: bool) -> list[Target]:
    """The weights, if any move, before the quantizer: its update makes the grid anew."""
    targets: list[Target] = []
    if recipe.latent_layers != []:
        relative = recipe.eps_mode == "relative_step"
        targets.append(Latent(loaded.fakes, loaded.folder.read, recipe.eps, recipe.lr, relative, gaussian, recipe.direction == "realized",
                              loaded.stream))  # fmt: skip
    if recipe.quantizer:
        targets.append(Quantizer(loaded.model, recipe.quantizer, recipe.quantizer_eps, recipe.quantizer_lr, gaussian))
    return targets


def units(targets: Sequence[Target]) -> dict[str, Units]:
    """What a replay of these targets needs of the base model beside their tensors, by tensor."""
    return {name: value for target in targets if isinstance(target, Latent) for name, value in target.units.items()}


def base_units(folder: Folder, header: dict[str, Any], device: torch.device) -> dict[str, Units]:
    """The same of a run's header: the grids of the base, one decoder layer in memory at a time."""
    found: dict[str, Units] = {}
    for group in header["groups"]:
        if group["name"] != "latent":
            continue
        names, realized = {tensor["name"] for tensor in group["tensors"]}, group["eps"] if group["settings"]["realized"] else None
        for layer, fakes in prepared_layers(skeleton(folder), folder, latent_config(folder), device, torch.float32):
            inside = {tensor_name(f"{name}.weight", "latent"): fake for name, fake in fakes.items()}
            found |= {name: units_of(fake, group["relative"], realized) for name, fake in inside.items() if name in names}
            release(layer)
    return found


def base_state(folder: Folder, header: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors that move, as the base model holds them, by name. Reads nothing else of the model."""
    state = {}
    for group in header["groups"]:
        read = {"codes": _base_codes, "lora": _base_adapters}.get(group["name"], _base_values)
        for tensor in group["tensors"]:
            state |= read(folder, group, tensor, device)
    return state


def _base_values(folder: Folder, group: dict[str, Any], tensor: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """fp32 [rows, cols]."""
    name, _, kind = tensor["name"].rpartition("/")
    stored = stored_scales(folder, name, read_config(folder)) if kind == "scales" else torch.atleast_2d(folder.read(name))
    value = stored.to(device, torch.float32, copy=True).contiguous()  # it will move in place; the folder's own must not
    if list(value.shape) != list(tensor["shape"]):
        raise BadInput(f"{folder.path}, {name}", f"shape {list(value.shape)}", f"{tensor['shape']}, as the journal says")
    return {tensor["name"]: value}


def _base_codes(folder: Folder, group: dict[str, Any], tensor: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Packed codes as QuantLinear holds them, and residuals of zero."""
    (rows, cols), config = tensor["shape"], read_config(folder)
    codes = format_of(config).read_layer(folder, tensor["name"].removesuffix("/codes"), config, rows, cols, device).codes
    if not group["settings"]["feedback"]:
        return {tensor["name"]: codes}
    return {tensor["name"]: codes, residual_name(tensor["name"]): torch.zeros(rows, cols, dtype=torch.int16, device=device)}


def _base_adapters(folder: Folder, group: dict[str, Any], tensor: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    return {tensor["name"]: initial(tensor["name"], tuple(tensor["shape"]), group["settings"]["seed"]).to(device)}


def replay(
    header: dict[str, Any], records: Sequence[Record], state: dict[str, torch.Tensor], known: dict[str, Units],
    progress: Progress | None = None, device: torch.device | None = None,
) -> None:  # fmt: skip
    """Apply recorded steps to `state` in place, without a forward: the same bits as the run itself (but for Gaussian noise).

    known: `units` of the run's targets, or `base_units`. device: where latents move that lie in host memory.
    """
    directions = header["directions"]
    for start in range(0, len(records), REPLAY_CHUNK):
        chunk = records[start : start + REPLAY_CHUNK]
        # A kernel is compiled for a number of steps; a step of zeros moves nothing, but on a CPU it takes its time.
        coefs = torch.zeros(len(header["groups"]), 1 << (len(chunk) - 1).bit_length(), directions)
        for i, record in enumerate(chunk):
            coefs[:, i] = torch.from_numpy(record.coefs.copy()).view(-1, directions)
        for group, rows in zip(header["groups"], coefs, strict=True):
            for tensor in group["tensors"]:
                values = state[tensor["name"]]
                at = torch.tensor([header["seed"], chunk[0].step], dtype=torch.int64, device=device or values.device)
                _apply(group, tensor, state, known, at, rows.to(at.device))
        if progress:
            progress(start + len(chunk), len(records))


def _apply(
    group: dict[str, Any], tensor: dict[str, Any], state: dict[str, torch.Tensor], known: dict[str, Units], at: torch.Tensor, coefs: torch.Tensor
) -> None:  # fmt: skip
    values, uid, settings = state[tensor["name"]], tensor["uid"], group["settings"]
    floor = float("-inf") if tensor["floor"] is None else tensor["floor"]
    if group["name"] == "codes":
        residual = state.get(residual_name(tensor["name"]))
        ops_codes.update_codes_(
            values, residual, at, coefs, uid, settings["bits"], tensor["shape"][1], settings["noise_bits"], settings["stream"]
        )
    elif group["name"] == "lora":
        replay_(values, at, coefs, uid, settings["noise_bits"], settings["stream"])
    elif group["name"] == "latent":
        move_(values, at, coefs, uid, known[tensor["name"]], settings["gaussian"])
    elif group["name"] == "quantizer":
        unit = settings["units"].get(tensor["name"], 1.0)
        shift_quantizer_(values, at, coefs, uid, tensor["name"], floor, unit, settings["gaussian"])
    else:
        ops.update_(values, at, coefs, uid, floor, group["relative"], settings["gaussian"])


def tuned_state(
    path: str, folder: Folder, device: torch.device, to: int | None = None, snapshots: bool = True,
    progress: Progress | None = None,
) -> tuple[int, dict[str, torch.Tensor]]:
    """(steps applied, tensors) of a run after `to` steps (default: all recorded), from the newest snapshot or from scratch.

    The tensors are on `device`, but in host memory where the run kept its latents there.
    """
    header, records = read_run(path)
    steps = steps_to(path, records, to)
    check_base(folder, header)
    host = header["recipe"].get("offload") == "latents"
    state, done = base_state(folder, header, torch.device("cpu") if host else device), 0
    found = newest_snapshot(Path(path), at_most=steps) if snapshots else None
    if found:
        done = found[0]
        for name, value in state.items():
            value.copy_(found[1][name])
    # Making units reads the weights of the base once more; a snapshot of the last step needs none.
    if left := records[done:steps]:
        replay(header, left, state, base_units(folder, header, device), progress, device)
    return steps, state


def load_any(name: str, device: str = "auto", dtype: str | None = None) -> tuple[LoadedModel, int | None]:
    """A folder, a hub id or a run as it is now; of a run with the number of steps applied."""
    if is_run(name):
        loaded, _, steps = load_run(name, device, dtype)
        return loaded, steps
    return load_model(name, device, dtype or "auto"), None


def load_run(
    path: str, device: str = "auto", dtype: str | None = None, to: int | None = None, snapshots: bool = True
) -> tuple[LoadedModel, list[Target], int]:
    """The tuned model of a run, its targets and the number of steps applied; `to` and `snapshots` as for `tuned_state`."""
    header, _ = read_run(path)
    recipe = recipe_of(header, path)
    loaded = load_base(recipe, device, dtype or recipe.dtype)
    steps, state = tuned_state(path, loaded.folder, loaded.device, to, snapshots)
    targets = build_targets(recipe, loaded)
    for target in targets:
        target.load_state(state)
    return loaded, targets, steps
