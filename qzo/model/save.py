"""Writing a model folder by streaming: bounded shards, everything in a .partial folder until it is whole."""

import json
import shutil
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qzo.errors import BadInput, RunFailed

SHARD_BYTES = 1 << 30


class FolderWriter:
    """Collects tensors and writes shards of about 1 GB; `finish` writes the index and config and renames the folder.

    Until then all is in `<out>.partial`, which goes when a `with` block of the writer ends. Raises BadInput when `out`
    exists and holds anything, RunFailed when the disk is full.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out).absolute()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise BadInput(str(out), "it exists and is not empty", "a new folder", "Name another, or remove it.")
        self.partial = self.out.with_name(self.out.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise BadInput(str(out), f"cannot be created ({error.strerror})", "a folder that can be written") from error
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._sizes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor (any device; copied to the CPU)."""
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._sizes += tensor.numel() * tensor.dtype.itemsize
        if sum(t.numel() * t.dtype.itemsize for t in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            path = self.partial / f"part-{len(self._shards):05d}.safetensors"
            try:
                save_file(self._pending, path, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
                raise RunFailed(str(path), f"cannot be written ({error})", "free space", "Free some and start again.") from error
            self._shards.append(list(self._pending))
            self._pending = {}

    def finish(self, config: dict, extra: dict[str, dict] | None = None) -> Path:
        """Write config.json, the index and the JSON files of `extra` (name -> object), then move the folder into place."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.partial / f"part-{number:05d}.safetensors").rename(self.partial / final)
            weight_map.update(dict.fromkeys(names, final))
        documents = {"config.json": config, **(extra or {})}
        if count > 1:
            index = {"metadata": {"total_size": self._sizes}, "weight_map": weight_map}
            documents["model.safetensors.index.json"] = index
        try:
            for name, document in documents.items():
                (self.partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            if self.out.exists():
                self.out.rmdir()
            self.partial.rename(self.out)
        except OSError as error:
            raise RunFailed(str(self.out), f"cannot be written ({error.strerror})", "free space", "Free some and start again.") from error
        return self.out
