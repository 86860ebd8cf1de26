"""A quantized folder that is written layer by layer and goes on after the last whole one.

<out>.partial/progress.json holds the settings and, for every decoder layer that is done, its shards with their SHA-256
and the errors of its Linears. It names a shard only when that is on disk: all other files are of no use to anybody.
"""

import fcntl
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

import qzo
from qzo.disk import fsync_path
from qzo.errors import BadInput, RunFailed
from qzo.model.files import Folder
from qzo.model.save import FolderWriter, NotWritten
from qzo.model.uniform import Quantization

PROGRESS = "progress.json"
_ENDS = 1 << 20
_FINAL = re.compile(r"model-(\d{5})-of-\d{5}\.safetensors")


def settings_of(folder: Folder, config: Quantization, method: str, windows: torch.Tensor | None, device: str, dtype: str) -> dict[str, Any]:
    """All that the quantized tensors depend on, as JSON; weights and calibration windows (int64 or None) by a hash."""
    settings = {
        "model": _identity(folder), "method": method, "bits": config.bits, "group_size": config.group_size, "sym": config.sym,
        "desc_act": config.desc_act, "format": config.version, "device": device, "dtype": dtype, "qzo version": qzo.__version__,
    }  # fmt: skip
    settings |= {key: getattr(config, key) for key in ("activations", "smoothing", "compensation", "reconstruction") if hasattr(config, key)}
    if windows is not None:
        digest = hashlib.sha256(windows.contiguous().numpy()).hexdigest()[:16]
        settings |= {"samples": windows.shape[0], "max_length": windows.shape[1], "calibration": digest}
    return settings


def _identity(folder: Folder) -> str:
    """A hash over the config and, for each weight file, its name, size and both ends: hashing all of it takes minutes."""
    total = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name in sorted(set(folder.tensors.values())):
        with open(folder.path / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            total.update(f"{name} {size}\n".encode() + file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            total.update(file.read(_ENDS))
    return total.hexdigest()[:16]


class LayerWriter(FolderWriter):
    """A FolderWriter that keeps whole decoder layers: made again with the same settings, it goes on after the last of them.

    `layers` holds the errors of the Linears of each layer done. A `with` block that a failure ends leaves them for the
    same command, unless it would fail again (BadInput, RunFailed other than a full disk). Raises BadInput where `<out>.partial`
    was begun with other settings; `restart` discards it; RunFailed where another process is writing it. A damaged layer is
    done again, and all layers after it.
    """

    def __init__(self, out: str | Path, settings: dict[str, Any], restart: bool = False):
        self._settings, self._restart = settings, restart
        self.layers: list[list[float]] = []
        self._records: list[dict] = []
        self._lock: int | None = None
        super().__init__(out)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        again = isinstance(error, BadInput | RunFailed) and not isinstance(error, NotWritten)
        if not self.layers or again:
            super().__exit__(kind, error, traceback)
        self._unlock()

    def _prepare(self) -> None:
        try:
            if self.partial.is_dir():
                self._hold()
            if not self._restart and (self.partial / PROGRESS).is_file():
                self._resume()
            if not self.layers:
                super()._prepare()
                self._hold()
        except BaseException:
            self._unlock()
            raise

    def _hold(self) -> None:
        """Keep other processes out of the folder: they would take away what is being written."""
        self._unlock()
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFailed(str(self.partial), "another process is writing it", do="Wait for it, or choose another folder.") from error
        except OSError:
            pass  # a file system without locks

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume(self) -> None:
        """Take over the layers that are done, and remove every other file."""
        try:
            found = json.loads((self.partial / PROGRESS).read_text("utf-8"))
            settings, records = dict(found["settings"]), list(found["layers"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            warnings.warn(f"{self.partial / PROGRESS}: damaged; all layers are done again", stacklevel=2)
            return
        changed = [f"{key}: {settings.get(key)} -> {self._settings.get(key)}" for key in sorted(settings | self._settings)
                   if settings.get(key) != self._settings.get(key)]  # fmt: skip
        if changed:
            raise BadInput(str(self.partial), f"begun with other settings ({', '.join(changed)})", "those it was begun with",
                           "Choose another folder, or add --restart, which discards the layers that are done.")  # fmt: skip
        for path in self.partial.glob("model-*"):  # killed while they got their last names
            if match := _FINAL.fullmatch(path.name):
                path.rename(self._part(int(match[1]) - 1))
        for record in records:
            if not self._take(record):
                warnings.warn(f"{self.partial}: layer {len(self.layers) + 1} is damaged; it and later ones are done again", stacklevel=2)
                break
        kept = {self._part(number).name for number in range(len(self._shards))} | {PROGRESS}
        for path in self.partial.iterdir():
            if path.name not in kept:
                path.unlink()
        if self.layers:
            self._write_progress()

    def _take(self, record: dict) -> bool:
        """Whether the shards of a layer are what was written; if so they count as written."""
        first = len(self._shards)
        try:
            errors = [float(error) for error in record["errors"]]
            if not all(_hash(self._part(first + i)) == part["sha256"] for i, part in enumerate(record["shards"])):
                return False
            names, size = [list(part["names"]) for part in record["shards"]], int(record["bytes"])
        except (OSError, KeyError, TypeError, ValueError):
            return False
        self._shards += names
        self._sizes += size
        self._records.append(record)
        self.layers.append(errors)
        return True

    def end_layer(self, errors: list[float]) -> None:
        """What was added since the last call is a whole decoder layer: it is on disk, and kept, when this returns."""
        first, shards, path = sum(len(record["shards"]) for record in self._records), [], self.partial
        self.flush()
        try:
            for number in range(first, len(self._shards)):
                path = self._part(number)
                fsync_path(path)
                shards.append({"sha256": _hash(path), "names": self._shards[number]})
            size = self._sizes - sum(record["bytes"] for record in self._records)
            self._records.append({"errors": errors, "bytes": size, "shards": shards})
            self._write_progress()
        except OSError as error:
            raise NotWritten(path, error) from error
        self.layers.append(errors)

    def _write_progress(self) -> None:
        path = self.partial / PROGRESS
        temporary = path.with_suffix(".tmp")
        document = {"settings": self._settings, "layers": self._records}
        temporary.write_text(json.dumps(document), encoding="utf-8")
        fsync_path(temporary)
        temporary.rename(path)
        fsync_path(self.partial)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of a layer that is done, on the CPU."""
        number = next(i for i, names in enumerate(self._shards) if name in names)
        with safe_open(self._part(number), framework="pt") as file:
            return file.get_tensor(name)

    def _remove_parts(self) -> None:
        (self.partial / PROGRESS).unlink()  # first: it must not name what is gone
        super()._remove_parts()

    def finish(self, config: dict, extra: dict[str, dict] | None = None) -> Path:
        path = super().finish(config, extra)
        (path / PROGRESS).unlink(missing_ok=True)
        return path


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
