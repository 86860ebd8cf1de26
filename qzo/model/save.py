"""Writing a model folder by streaming: bounded shards, everything in a .partial folder until it is whole."""

import json
import shutil
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qzo.errors import BadInput, RunFailed

SHARD_BYTES = 1 << 30


class NotWritten(RunFailed):
    """The disk did not take a file."""

    def __init__(self, path: Path, error: Exception):
        reason = getattr(error, "strerror", None) or error  # safetensors wraps the system's error in its own
        super().__init__(str(path), f"cannot be written ({reason})", "free space", "Free some and start again.")


class FolderWriter:
    """Collects tensors and writes shards of at most about 1 GB; `finish` writes the index and config and renames the folder.

    Until then all is in `<out>.partial`, which goes when a `with` block of the writer ends. Raises BadInput when `out`
    exists and holds anything, NotWritten when the disk is full.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out).absolute()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise BadInput(str(out), "it exists and is not empty", "a new folder", "Name another, or remove it.")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._pending: dict[str, torch.Tensor] = {}
        self._waiting = 0
        self._shards: list[list[str]] = []
        self._sizes = 0
        try:
            self._prepare()
        except OSError as error:
            raise BadInput(str(out), f"cannot be created ({error.strerror})", "a folder that can be written") from error

    def _prepare(self) -> None:
        """An empty `.partial` folder: what a killed writer left goes."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor, copy: bool = True) -> None:
        """Queue one tensor (any device; copied to the CPU, unless it is there and `copy` is false: then it must not change)."""
        size = tensor.numel() * tensor.dtype.itemsize
        if self._waiting + size > SHARD_BYTES:
            self.flush()
        self._pending[name] = tensor.detach().to("cpu", copy=copy).contiguous()
        self._waiting += size

    def flush(self) -> None:
        """Write what is queued as a shard of its own."""
        if self._pending:
            self.save(self._pending, self._part(len(self._shards)))
            self._shards.append(list(self._pending))
            self._sizes += self._waiting
            self._pending, self._waiting = {}, 0

    def _part(self, number: int) -> Path:
        return self.partial / f"part-{number:05d}.safetensors"

    @staticmethod
    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        """Write tensors of the CPU to one file, whatever its size."""
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise NotWritten(path, error) from error

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        try:
            (self.partial / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise NotWritten(self.out, error) from error

    def _remove_parts(self) -> None:
        for number in range(len(self._shards)):
            self._part(number).unlink()

    def finish(self, config: dict, extra: dict[str, dict] | None = None) -> Path:
        """Write config.json, the index and the JSON files of `extra` (name -> object), then move the folder into place.

        Shards that fit one become model.safetensors.
        """
        self.flush()
        count = len(self._shards)
        single = self._sizes <= SHARD_BYTES or count == 1
        finals = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        documents = {"config.json": config, **(extra or {})}
        if not single:
            weight_map = {name: final for final, names in zip(finals, self._shards, strict=True) for name in names}
            documents["model.safetensors.index.json"] = {"metadata": {"total_size": self._sizes}, "weight_map": weight_map}
        elif count > 1:
            tensors = {name: tensor for number in range(count) for name, tensor in load_file(self._part(number)).items()}
            self.save(tensors, self.partial / "model.safetensors")
        # Before the shards have their names, by which an interrupted quantization would no longer find them.
        self._write(documents)
        try:
            if single and count > 1:
                self._remove_parts()
            else:
                for number, final in enumerate(finals):
                    self._part(number).rename(self.partial / ("model.safetensors" if single else final))
        except OSError as error:
            raise NotWritten(self.out, error) from error
        return self.place({})

    def _write(self, documents: dict[str, dict]) -> None:
        for name, document in documents.items():
            self.write_text(name, json.dumps(document, indent=2) + "\n")

    def place(self, documents: dict[str, dict]) -> Path:
        """Write JSON files (name -> object), then move the folder into place."""
        self._write(documents)
        try:
            if self.out.exists():
                self.out.rmdir()
            self.partial.rename(self.out)
        except OSError as error:
            raise NotWritten(self.out, error) from error
        return self.out
