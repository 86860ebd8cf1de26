"""Snapshots of a run: they bound how much of the journal a resume replays.

RUN/snapshots/step-000200/ holds state.safetensors and manifest.json; 200 steps are applied in it (records 0 .. 199).
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qzo.disk import disk_error, fsync_path

_STATE = "state.safetensors"
_MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step-(\d{6,})")


def write_snapshot(run: Path, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], keep: int = 2) -> Path:
    """Write the snapshot of `step` applied steps, on disk when this returns, and keep the newest `keep` up to it.

    The caller has synced the journal. `meta` is JSON without NaN or infinity. A later snapshot can only be left from
    a journal that was longer once, and goes too. Raises RunFailed where the disk is full; the others stay untouched.
    """
    folder = Path(run) / "snapshots"
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        # Left by a crash. Only the one writer of a run may do this: a reader would take away what is being written.
        for path in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)
        temporary.mkdir(parents=True)
        _fill(temporary, step, tensors, meta)
        _discard(final)
        os.rename(temporary, final)
        fsync_path(folder)
        older = [path for number, path in _snapshots(folder) if number < step]
        later = [path for number, path in _snapshots(folder) if number > step]
        for path in later + older[max(keep - 1, 0) :]:
            _discard(path)
    except (OSError, SafetensorError) as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise disk_error(final, error, int(code[1]) if code else None) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def newest_snapshot(run: Path, at_most: int | None = None) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(applied steps, tensors on the CPU, meta) of the newest valid snapshot of at most `at_most` steps, or None.

    A damaged snapshot is passed over with a warning that names it. Changes nothing: a run may be going on.
    """
    folder = Path(run) / "snapshots"
    for step, path in _snapshots(folder):
        if at_most is None or step <= at_most:
            try:
                return (step, *_read(path, step))
            except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
                warnings.warn(f"{path}: damaged snapshot passed over ({error})", stacklevel=2)
    return None


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the names in sorted order, each with its dtype, shape and bytes; the device does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fill(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    state = folder / _STATE
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, state)
    manifest = {"step": step, "sha256": _file_hash(state), "tensors": len(tensors)}
    manifest["meta"] = json.loads(json.dumps(meta, allow_nan=False))
    manifest["check"] = _check(manifest)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), "utf-8")
    for name in (_STATE, _MANIFEST, "."):
        fsync_path(folder / name)


def _read(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
    if not isinstance(manifest, dict) or manifest.get("check") != _check(manifest) or manifest["step"] != step:
        raise ValueError(f"{_MANIFEST} is not what was written")
    if _file_hash(folder / _STATE) != manifest["sha256"]:
        raise ValueError(f"sha256 of {_STATE} differs")
    tensors = load_file(folder / _STATE)
    if len(tensors) != manifest["tensors"]:
        raise ValueError(f"{len(tensors)} tensors, expected {manifest['tensors']}")
    return tensors, manifest["meta"]


def _check(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _discard(path: Path) -> None:
    # Renamed first: a removal that a crash interrupts must not leave half a snapshot under its name.
    if path.exists():
        gone = path.with_name(f"{_TEMPORARY}gone-{path.name}")
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
