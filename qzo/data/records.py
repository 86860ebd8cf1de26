"""Records of a split, from a folder of {split}.jsonl, one .jsonl file, or a dataset of the Hugging Face hub."""

import json
import re
from pathlib import Path

from qzo.errors import BadInput
from qzo.model.files import BUILTIN, resolve

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def read_records(data: str | Path, split: str) -> list[tuple[str, dict]]:
    """All records of `split` as (where it stands, fields).

    `data` is a folder that holds {split}.jsonl, a .jsonl file, `builtin:NAME`, or a hub id `owner/name` or `owner/name:config`.
    BadInput names the file and the line of what cannot be read, and says when a split is empty.
    """
    path = resolve(str(data)) if str(data).startswith(BUILTIN) else Path(data)
    if path.is_dir():
        found = _read_folder(path, split)
    elif path.is_file():
        found = _read_jsonl(path)
    elif path.suffix != ".jsonl" and _HUB_ID.fullmatch(str(data)):
        found = _read_hub(str(data), split)
    else:
        raise BadInput(str(data), "no such file or folder", "a folder of {split}.jsonl, a .jsonl file or a hub id")
    if not found:
        raise BadInput(f"{data}, split {split}", "no examples", "at least one")
    return found


def _read_folder(folder: Path, split: str) -> list[tuple[str, dict]]:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise BadInput(str(folder), f"no {path.name} in it (it holds {present})", f"a file {path.name}")
    return _read_jsonl(path)


def _read_jsonl(path: Path) -> list[tuple[str, dict]]:
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise BadInput(where, f"not valid JSON ({error})", "one JSON object per line, UTF-8") from None
            if not isinstance(record, dict):
                raise BadInput(where, f"a JSON {type(record).__name__}", "one JSON object per line")
            found.append((where, record))
    return found


def _read_hub(name: str, split: str) -> list[tuple[str, dict]]:
    try:
        import datasets
    except ImportError:
        raise BadInput(
            name,
            "no such file or folder here, and the package `datasets` that would read it from the hub is not installed",
            do='Give a folder of {split}.jsonl, or install the extra: pip install "qzo[hub]"',
        ) from None
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        given = f"the hub's split {split} cannot be read ({error})"
        raise BadInput(name, given, "a public dataset `owner/name` or `owner/name:config`") from None
    return [(f"{name} {split} row {number}", dict(row)) for number, row in enumerate(rows)]
