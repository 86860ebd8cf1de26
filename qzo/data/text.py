"""Plain text for pre-training and perplexity: documents one after another, cut into windows that do not overlap.

A window is an example: all its tokens but the first are predicted.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qzo.data.encode import Encoded, Option
from qzo.data.permutation import subset
from qzo.data.records import each_record, located
from qzo.data.tasks import get_task, made
from qzo.errors import BadInput

BATCH = 1 << 20  # characters whose tokens are made at once


class Windows(Sequence[Encoded]):
    """Windows of token ids `ids`, i32 [windows, length], 4 bytes a token; one becomes an Encoded when it is asked for."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Encoded:
        window = tuple(self.ids[index].tolist())
        return Encoded((window[:-1],), (Option(0, 0, window[1:]),), 0)


def documents(data: str | Path, split: str, streaming: bool = False) -> Iterator[str]:
    """The texts of a split, in order, without the blank ones.

    `data` is a .txt file, which is one document; a folder with {split}.txt and no {split}.jsonl, the same; or what
    `each_record` reads: the field `text` of its records. BadInput names the file, and the line where there is one.
    """
    file = _text_file(located(data), split)
    if file is None:
        texts = (made(get_task("text"), where, record).prompt for where, record in each_record(data, split, streaming))
        yield from (text for text in texts if text.strip())
        return
    try:
        yield file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(file), f"cannot be read ({error})", "a UTF-8 text file") from None


def read_windows(
    data: str | Path, split: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None, streaming: bool = False
) -> Windows:
    """The windows of a split of `data` (see `documents`), chosen as `load_examples` chooses examples.

    limit: of the split "train", the first `limit` of one fixed random order; of any other, and where `streaming`, the
    first `limit` of the text, and no document behind them is read.
    """
    drawn = limit is not None and split == "train" and not streaming
    windows = cut(documents(data, split, streaming), f"{data}, split {split}", tokenizer, length, None if drawn else limit)
    return Windows(windows.ids[list(subset(limit, len(windows)))]) if drawn else windows


def cut(texts: Iterable[str], where: str, tokenizer: PreTrainedTokenizerBase, length: int, first: int | None = None) -> Windows:
    """All, or the `first` so many, windows of `length` tokens of the texts; what is left at the end is dropped.

    Each text is tokenised whole, with the BOS or EOS that the tokenizer puts around a text. BadInput at `where`: not one window.
    """
    if length < 2:
        raise BadInput("window", str(length), "at least 2 tokens")
    ids = array("i")
    for part in _parts(texts, BATCH if first is None else 1):
        for found in tokenizer(part, verbose=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]:
            ids.extend(found)
        if first is not None and len(ids) >= first * length:
            break
    count = len(ids) // length
    if not count:
        raise BadInput(where, f"{len(ids)} tokens", f"at least one window of {length}", "Give a longer text or a smaller window (max_length).")
    return Windows(torch.frombuffer(ids, dtype=torch.int32)[: count * length].view(count, length)[:first])


def _parts(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of at least `size` characters each, but for the last."""
    part, held = [], 0
    for text in texts:
        part.append(text)
        held += len(text)
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part


def _text_file(path: Path, split: str) -> Path | None:
    if path.is_file() and path.suffix == ".txt":
        return path
    if not path.is_dir() or (path / f"{split}.jsonl").is_file():
        return None
    file = path / f"{split}.txt"
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".txt"))) or "no such file"
        do = "Name another split (train_split, eval_split, --split)."
        raise BadInput(str(path), f"no {split}.jsonl and no {split}.txt in it (it holds {held})", "one of them", do)
    return file
