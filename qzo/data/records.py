"""Records of a split, from a folder of {split}.jsonl, one .jsonl file, or a dataset of the Hugging Face hub."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    if choose is None:
        found = list(islice(each_record(data, split, streaming), first))
    elif path := _file(data, split):
        found = _chosen(path, choose)
    else:
        found = [_of_hub(data, split, index, row) for index, row in _hub_rows(str(data), split, choose, streaming)]
    if not found:
        raise BadInput(f"{data}, split {split}", "no examples", "at least one")
    return found


def each_record(data: str | Path, split: str, streaming: bool = False) -> Iterator[Record]:
    """The records of `split` of the same `data`, read one by one as they are asked for."""
    if path := _file(data, split):
        yield from (_parse(path, number, line) for number, line in _lines(path))
    else:
        yield from (_of_hub(data, split, index, row) for index, row in _hub_rows(str(data), split, None, streaming))


def located(data: str | Path) -> Path:
    """The path that `data` names: what `builtin:NAME` stands for, else itself, whether it is there or not."""
    return resolve(str(data)) if str(data).startswith(BUILTIN) else Path(data)


def _file(data: str | Path, split: str) -> Path | None:
    """The file of a split; None for a hub id."""
    path = located(data)
    if path.is_dir():
        return _split_file(path, split)
    if path.is_file():
        return path
    if path.suffix != ".jsonl" and _HUB_ID.fullmatch(str(data)):
        return None
    raise BadInput(str(data), "no such file or folder", "a folder of {split}.jsonl, a .jsonl file or a hub id")


def _split_file(folder: Path, split: str) -> Path:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise BadInput(str(folder), f"no {path.name} in it (it holds {present})", f"a file {path.name}")
    return path


def _chosen(path: Path, choose: Choice) -> list[Record]:
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


def _hub_rows(name: str, split: str, choose: Choice | None, streaming: bool) -> Iterator[tuple[int, dict]]:
    """(index, fields) of the rows, all or those that are chosen."""
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
        yield from enumerate(rows) if choose is None else ((index, rows[index]) for index in choose(len(rows)))
    except Exception as error:  # nothing narrower: what its readers of files and of the network raise is theirs
        given = f"the hub's split {split} cannot be read ({_one_line(error)})"
        raise BadInput(name, given, "a public dataset `owner/name` or `owner/name:config`") from error


def _of_hub(name: str | Path, split: str, index: int, row: Mapping) -> Record:
    return f"{name} {split} row {index}", dict(row)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
