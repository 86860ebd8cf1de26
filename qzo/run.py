"""A run folder: what it holds, how a run is set up from its recipe, and its tuned tensors rebuilt from the journal.

    recipe.yaml  journal.bin  snapshots/  metrics.jsonl  loss.png  report.md  report.html  (tracker.json)
"""

import fcntl
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import qzo
from qzo.errors import BadInput, RunFailed
from qzo.journal import Record, read_journal
from qzo.model.files import Folder
from qzo.model.load import LoadedModel
from qzo.recipe import Recipe, default_output_dir, diff
from qzo.zo.estimator import Clip
from qzo.zo.noise import NOISE_VERSION
from qzo.zo.optimizer import ZO
from qzo.zo.targets import Target

OWN_FILES = ("recipe.yaml", "snapshots", "metrics.jsonl", "loss.png", "report.md", "report.html", "tracker.json", "tensorboard")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "journal.bin"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def is_run(path: str) -> bool:
    return (Path(path) / "journal.bin").exists()


def run_folder(recipe: Recipe, name: str) -> RunFolder:
    return RunFolder(Path(recipe.output_dir or default_output_dir(recipe, name)))


def claim(recipe: Recipe, name: str, restart: bool = False) -> tuple[RunFolder, dict[str, Any] | None]:
    """(the folder of a run, the header of the run in it that goes on; None for a new one). Writes nothing.

    Raises BadInput for a folder that holds something else, and, with a diff, for a run with another recipe (unless it
    is to start over); RunFailed for a run to start over that another process is still writing.
    """
    folder = run_folder(recipe, name)
    if folder.path.exists() and not folder.path.is_dir():
        raise BadInput(str(folder.path), "a file", "a folder for the run", "Choose another output_dir.")
    present = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        raise BadInput(str(folder.path), f"cannot be written in {present}", "a folder that can be", "Choose another output_dir.")
    if not folder.journal.exists():
        taken = next((name for name in OWN_FILES if (folder.path / name).exists()), None)
        if taken:
            raise BadInput(str(folder.path), f"{taken} and no journal.bin", "a new folder, or that of a run", "Choose another output_dir.")
        return folder, None
    if restart:
        _check_idle(folder)
        return folder, None
    header, _ = read_journal(folder.journal)
    lines = diff(header["recipe"], recipe.model_dump())
    if lines:
        raise BadInput(
            str(folder.path), "a run with another recipe\n  " + "\n  ".join(lines), "the same recipe to continue it",
            "Undo the change, choose another output_dir, or add --restart to start over (the old folder is kept).",
        )  # fmt: skip
    return folder, header


def _check_idle(folder: RunFolder) -> None:
    # Moved away under a running process, its snapshots would land in the new run's folder.
    with folder.journal.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFailed(str(folder.path), "another process is writing this run", do="Stop it, then start over.") from error


def keep_aside(folder: RunFolder) -> Path | None:
    """Move the run out of the way, under the first free name; None where there is none."""
    if not folder.journal.exists():
        return None
    path, number = folder.path.absolute(), 1
    while (other := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return path.rename(other)


def build_optimizer(recipe: Recipe, targets: Sequence[Target], device: torch.device) -> ZO:
    return ZO(targets, recipe.seed, recipe.directions, Clip(recipe.clip, recipe.clip_median), recipe.stacked, device)


def make_header(
    recipe: Recipe, name: str, loaded: LoadedModel, targets: Sequence[Target], data_sha256: str, micro_batch: int
) -> dict[str, Any]:
    """All that a replay needs besides the base model's folder, and what the run was made with."""
    groups = [
        {
            "name": t.name, "eps": t.eps, "lr": t.lr, "relative": t.relative, "settings": t.settings(),
            "tensors": [{**asdict(i), "floor": i.floor if i.floor > float("-inf") else None} for i in t.info()],
        }
        for t in targets
    ]  # fmt: skip
    return {
        "base": {"model": recipe.model, "sha256": loaded.folder.sha256()},
        "recipe_name": name, "recipe": recipe.model_dump(),
        "noise": {"version": NOISE_VERSION, "distribution": recipe.noise if recipe.method in ("qzo", "zeroqat") else "integer normal",
                  "bit_exact": "on one kind of device" if recipe.noise == "gaussian" else "on every device"},
        "data_sha256": data_sha256, "seed": recipe.seed, "directions": recipe.directions, "count": recipe.directions * len(targets),
        "groups": groups, "micro_batch": micro_batch,
        "threads": torch.get_num_threads(), "device": device_name(loaded.device), "dtype": str(loaded.dtype),
        "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "qzo": qzo.__version__, "torch": torch.__version__}
    for package in ("triton", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def check_base(folder: Folder, header: dict[str, Any]) -> None:
    """Raises BadInput when the folder holds other weights than the run was tuned on."""
    given = folder.sha256()
    if given != header["base"]["sha256"]:
        raise BadInput(str(folder.path), f"weights with SHA-256 {given[:12]}…", f"{header['base']['sha256'][:12]}…, on which the run was made",
                       "Give the folder that the run was tuned from.")  # fmt: skip


def check_data(recipe: Recipe, given: str, header: dict[str, Any]) -> None:
    """Raises BadInput when the training examples, as token ids, are others than those the run began with."""
    if given != header["data_sha256"]:
        raise BadInput(f"{recipe.data}, split {recipe.train_split}", "other examples than the run began with", "the same data",
                       "Restore the data, choose another output_dir, or add --restart to start over.")  # fmt: skip


def recipe_of(header: dict[str, Any], where: str) -> Recipe:
    """The recipe in a journal's header. Raises RunFailed when this version does not know it."""
    try:
        return Recipe.model_validate(header["recipe"])
    except ValidationError as error:
        raise RunFailed(where, "a recipe that this version cannot read", do="Use the qzo that wrote it.") from error


def read_run(path: str) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a run folder. Raises BadInput when it is none or another noise version is needed."""
    if not is_run(path):
        raise BadInput(path, "no journal.bin", "the folder of a run", "`qzo tune` prints it when it starts.")
    header, records = read_journal(RunFolder(Path(path)).journal)
    if header["noise"]["version"] != NOISE_VERSION:
        raise RunFailed(path, f"noise version {header['noise']['version']}", f"{NOISE_VERSION}", "Use the qzo that wrote it.")
    return header, records


def steps_to(path: str, records: list[Record], to: int | None) -> int:
    """How many steps to apply: `to`, or all. Raises BadInput for more than are recorded."""
    steps = len(records) if to is None else to
    if not 0 <= steps <= len(records):
        raise BadInput(f"{path}, --to", str(to), f"0 to {len(records)}, the steps that are recorded")
    return steps


def changes(header: dict[str, Any], loaded: LoadedModel, pieces: dict[str, Any]) -> list[str]:
    """What is another now than where the run began, and what of it: its device, or in which pieces a step is measured."""
    here = f"{device_name(loaded.device)}, {loaded.dtype}, torch {torch.__version__}"
    there = f"{header['device']}, {header['dtype']}, torch {header['versions']['torch']}"
    said = []
    if here != there:
        said.append(f"the run began on {there} and goes on on {here}: it replays all the same, but other losses will be measured than there")
    began = header["recipe"] | {"micro_batch": header["micro_batch"]}
    for key, value in pieces.items():
        if value != began[key]:
            said.append(f"{key} was {began[key]} and is {value} from here on: the same losses, but for rounding")
    return said
