"""Records of a split, from a folder of {split}.jsonl, one .jsonl file, or a dataset of the Hugging Face hub."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from qzo.errors import BadInput
from qzo.model.files import BUILTIN, resolve

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")

Record = tuple[str, dict]  # where it stands, its fields
Choice = Callable[[int], Sequence[int]]  # the number of records -> the indices of those that are wanted, in order


def read_records(
    data: str | Path, split: str, first: int | None = None, choose: Choice | None = None, streaming: bool = False
) -> list[Record]:
    """The records of `split`: all, the `first` so many, or those that `choose` names.

    `data` is a folder that holds {split}.jsonl, a .jsonl file, `builtin:NAME`, or a hub id `owner/name` or `owner/name:config`.
    first: nothing behind them is read. choose: of a file, the lines are counted and the chosen ones parsed, no other is kept.
    streaming: the records of a hub dataset are fetched as they are read, instead of the whole dataset before.
    BadInput names the file and the line of what cannot be read, and says when a split is empty.
    """
    path = resolve(str(data)) if str(data).startswith(BUILTIN) else Path(data)
    if path.is_dir():
        found = _read_jsonl(_split_file(path, split), first, choose)
    elif path.is_file():
        found = _read_jsonl(path, first, choose)
    elif path.suffix != ".jsonl" and _HUB_ID.fullmatch(str(data)):
        found = _read_hub(str(data), split, first, choose, streaming)
    else:
        raise BadInput(str(data), "no such file or folder", "a folder of {split}.jsonl, a .jsonl file or a hub id")
    if not found:
        raise BadInput(f"{data}, split {split}", "no examples", "at least one")
    return found


def _split_file(folder: Path, split: str) -> Path:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise BadInput(str(folder), f"no {path.name} in it (it holds {present})", f"a file {path.name}")
    return path


def _read_jsonl(path: Path, first: int | None, choose: Choice | None) -> list[Record]:
    if choose is None:
        return [_parse(path, number, line) for number, line in islice(_lines(path), first)]
    order = choose(sum(1 for _ in _lines(path)))
    wanted, found = set(order), {}
    for index, (number, line) in enumerate(islice(_lines(path), max(order, default=-1) + 1)):
        if index in wanted:
            found[index] = _parse(path, number, line)
    return [found[index] for index in order]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise BadInput(str(path), f"cannot be read ({error.strerror})", "a .jsonl file") from error


def _parse(path: Path, number: int, line: bytes) -> Record:
    where = f"{path} line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"not valid JSON ({error})", "one JSON object per line, UTF-8") from None
    if not isinstance(record, dict):
        raise BadInput(where, f"a JSON {type(record).__name__}", "one JSON object per line")
    return where, record


def _read_hub(name: str, split: str, first: int | None, choose: Choice | None, streaming: bool) -> list[Record]:
    try:
        import datasets
    except ImportError:
        raise BadInput(
            name,
            "no such file or folder here, and the package `datasets` that would read it from the hub is not installed",
            do='Give a folder of {split}.jsonl, or install the extra: pip install "qzo[hub]"',
        ) from None
    path, _, config = name.partition(":")
    lazily = {"streaming": True} if streaming else {}
    try:
        rows = datasets.load_dataset(path, config or None, split=split, **lazily)
        if choose is None:
            numbered = list(enumerate(islice(rows, first)))
        else:
            numbered = [(index, rows[index]) for index in choose(len(rows))]
    except Exception as error:  # nothing narrower: what its readers of files and of the network raise is theirs
        given = f"the hub's split {split} cannot be read ({_one_line(error)})"
        raise BadInput(name, given, "a public dataset `owner/name` or `owner/name:config`") from error
    return [(f"{name} {split} row {number}", dict(row)) for number, row in numbered]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
