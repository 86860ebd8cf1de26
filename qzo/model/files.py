"""A model folder, read tensor by tensor: only safetensors and JSON, and no path that leaves the folder."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qzo.errors import BadInput
from qzo.model.save import NotWritten

BUILTIN = "builtin:"
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "generation_config.json", "chat_template*", "*.model", "LICENSE*",
)  # fmt: skip


def resolve(name: str) -> Path:
    """The local path of a folder or file, of `builtin:NAME` (shipped with qzo), or of a hub id (downloaded or cached).

    Raises BadInput when it is none of them.
    """
    if name.startswith(BUILTIN):
        root = Path(str(package_files("qzo.embedded")))
        path = (root / name[len(BUILTIN) :]).resolve()
        if not path.exists() or root.resolve() not in path.parents:
            known = ", ".join(sorted(BUILTIN + p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._"))
            raise BadInput(name, "nothing of that name ships with qzo", known)
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise BadInput(name, "no such file or folder", "a folder, or a hub id like org/name")
    return _from_hub(name)


def one_line(error: Exception) -> str:
    """What an error of another package says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "vocab.*", "*.model", "*.jinja", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            name, f"neither a folder here nor a model that the hub gives ({one_line(error)})",
            "a folder, or a hub id like org/name", "Check the spelling, the network, and `hf auth login` for gated models.",
        ) from error  # fmt: skip


class Folder:
    """One model folder on disk. `tensors` maps each tensor's name to its file.

    Raises BadInput for a missing or unreadable config, no safetensors (pickles are refused), an index that names
    a missing file or a path outside the folder, and truncated files.
    """

    def __init__(self, name: str | Path):
        self.path = resolve(str(name))
        if not self.path.is_dir():
            raise BadInput(str(name), "a file", "a model folder", "Name the folder that holds config.json.")
        self.config = self.read_json("config.json")
        self._handles: dict[str, Any] = {}
        self.tensors = self._locate()

    def fit_length(self, max_length: int) -> int:
        """`max_length` tokens, or the model's context where that is shorter."""
        context = self.config.get("max_position_embeddings")
        return min(max_length, context) if isinstance(context, int) and context > 0 else max_length

    def read_json(self, name: str) -> dict:
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BadInput(str(path), "missing", "a transformers model folder with it") from error
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(str(path), f"cannot be read ({one_line(error)})", "JSON") from error
        if not isinstance(value, dict):
            raise BadInput(str(path), type(value).__name__, "a JSON object")
        return value

    def _locate(self) -> dict[str, str]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            return self._from_index(index)
        single = [p.name for p in self.path.glob("*.safetensors")]
        if not single:
            pickles = [p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            if pickles:
                raise BadInput(
                    str(self.path), f"only pickled weights ({pickles[0]})", "safetensors",
                    "Pickles run code when they are read. Convert them where you trust them: "
                    "model.save_pretrained(OUT, safe_serialization=True).",
                )  # fmt: skip
            raise BadInput(str(self.path), "no weights", "model.safetensors, or shards with their index")
        if "model.safetensors" in single:
            single = ["model.safetensors"]
        if len(single) > 1:
            raise BadInput(str(self.path), f"{len(single)} safetensors files and no index", index.name)
        return {name: single[0] for name in self._open(single[0]).keys()}

    def _from_index(self, index: Path) -> dict[str, str]:
        mapping = self.read_json(index.name).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise BadInput(str(index), "no weight_map", "a map from tensor names to files")
        for name in sorted(set(map(str, mapping.values()))):
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise BadInput(str(index), f"weight_map names {name!r}", "a .safetensors file inside the folder")
            held = set(self._open(name).keys())
            absent = [t for t, file in mapping.items() if file == name and t not in held]
            if absent:
                raise BadInput(str(self.path / name), f"lacks {absent[0]}", "the tensors that the index lists for it")
        return dict(mapping)

    def _open(self, name: str) -> Any:
        if name not in self._handles:
            path = self.path / name
            if not path.exists():
                raise BadInput(str(path), "missing shard", "the file that the index names", "Download the folder again.")
            try:
                self._handles[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    str(path), f"not a whole safetensors file ({error})", "an undamaged file", "Download it again."
                ) from error
        return self._handles[name]

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def _there(self, name: str) -> str:
        stored = self._stored_name(name)
        if stored is None:
            raise BadInput(str(self.path), f"no tensor {name}", "every tensor of the model", "The checkpoint is incomplete.")
        return stored

    def _stored_name(self, name: str) -> str | None:
        """Base-model checkpoints (OPT's, for one) leave out the leading `model.`."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self.tensors:
                return candidate
        return None

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, backed by the mapped file. Raises BadInput when the checkpoint lacks it."""
        stored = self._there(name)
        return self._open(self.tensors[stored]).get_tensor(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """BadInput as in `read`."""
        stored = self._there(name)
        return tuple(self._open(self.tensors[stored]).get_slice(stored).get_shape())

    def sha256(self) -> str:
        """Identity of the weights: SHA-256 over the weight files' own SHA-256, in order of their names."""

        def digest(name: str) -> bytes:
            with open(self.path / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()

        with ThreadPoolExecutor(8) as pool:
            return hashlib.sha256(b"".join(pool.map(digest, sorted(set(self.tensors.values()))))).hexdigest()

    def copy_side_files(self, out: Path) -> None:
        """Tokenizer, generation config, licence: all that belongs to a model and is neither weights nor config."""
        for pattern in SIDE_FILES:
            for path in self.path.glob(pattern):
                if path.is_file() and path.suffix not in (".bin", ".pt", ".py"):
                    self._copy(path, out / path.name)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        try:
            shutil.copyfile(source, target)
        except OSError as error:  # it would name the source
            raise NotWritten(target, error) from error
