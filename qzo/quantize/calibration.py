"""Calibration text: windows of equal length, spread evenly over a file's documents."""

from typing import Any

import torch

from qzo.data.records import read_records
from qzo.errors import BadInput
from qzo.model.files import resolve


def load_windows(name: str, tokenizer: Any, samples: int, max_length: int, vocab: int) -> torch.Tensor:
    """Token ids int64 [samples, max_length] from the concatenated documents of a file.

    `name` is a .jsonl file with the field `text`, a .txt file, or one of them under `builtin:`. Raises BadInput for a
    file that cannot be read, by line, and for one that is too short, with the tokens found and needed.
    """
    ids: list[int] = []
    for document in _documents(name):
        ids += tokenizer(document, verbose=False)["input_ids"]
    if ids and max(ids) >= vocab:
        raise BadInput("tokenizer", f"the token {max(ids)}", f"tokens below the model's vocabulary size of {vocab}")
    windows = len(ids) // max_length
    if windows < samples:
        do = f"Give more text, or take samples={windows}." if windows else "Give more text, or a smaller max_length."
        raise BadInput(name, f"{len(ids)} tokens", f"{samples * max_length} ({samples} windows of {max_length})", do)
    chosen = torch.arange(samples) * windows // samples
    return torch.tensor(ids)[: windows * max_length].view(windows, max_length)[chosen]


def _documents(name: str) -> list[str]:
    path = resolve(name)
    if path.suffix not in (".jsonl", ".txt") or not path.is_file():
        raise BadInput(name, "not such a file", "calibration text: a .jsonl file with the field text, or a .txt file")
    if path.suffix == ".jsonl":
        return [_text(where, record) for where, record in read_records(path, "calibration")]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(name, f"cannot be read ({error})", "UTF-8 text") from error


def _text(where: str, record: dict) -> str:
    if not isinstance(record.get("text"), str):
        raise BadInput(where, f"the fields {', '.join(record)}", 'a field "text" that holds text')
    return record["text"]
