"""Plain text for pre-training and perplexity: documents one after another, cut into windows that do not overlap.

A window is an example: all its tokens but the first are predicted.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qzo.data.encode import Encoded, Option, leading_ids, token_ids
from qzo.data.permutation import subset
from qzo.data.records import each_record, located
from qzo.data.tasks import get_task, made
from qzo.errors import BadInput

BATCH = 1 << 18  # characters whose tokens are made at once
AROUND = 256  # characters on either side by which a seam is judged
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


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
    for found in _token_ids(texts, tokenizer, BATCH if first is None else 1):
        ids.extend(found)
        if first is not None and len(ids) >= first * length:
            break
    count = len(ids) // length
    if not count:
        raise BadInput(where, f"{len(ids)} tokens", f"at least one window of {length}", "Give a longer text or a smaller window (max_length).")
    return Windows(torch.frombuffer(ids, dtype=torch.int32)[: count * length].view(count, length)[:first])


def _token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[list[int]]:
    """The ids of the texts in order, in lists of any length."""
    for part in _parts(texts, size):
        if len(part[0]) <= 2 * BATCH:
            yield from tokenizer(part, verbose=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
            continue
        word = token_ids(["a"], tokenizer)[0]
        begin = leading_ids(tokenizer)
        yield begin
        yield from _in_pieces(part[0], tokenizer)
        yield tokenizer("a")["input_ids"][len(begin) + len(word) :]


def _in_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of a long text, piece by piece: at once they would take the memory of hundreds of bytes per token."""
    context = start = 0
    while start < len(text):
        seam = _seam(text, start + BATCH, tokenizer)
        before, ids = token_ids([text[context:start], text[context:seam]], tokenizer)
        yield ids[len(before) :]
        context, start = max(0, seam - AROUND), seam


def _seam(text: str, least: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """A place from `least` on, between two words, where a token ends whatever follows; the end of the text if none is near."""
    for match in islice(_BETWEEN_WORDS.finditer(text, least, least + BATCH), 8):
        at = match.start()
        before, around = token_ids([text[max(0, at - AROUND) : at], text[max(0, at - AROUND) : at + AROUND]], tokenizer)
        if around[: len(before)] == before:
            return at
    return len(text)


def _parts(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of at most `size` characters, or of one text."""
    part, held = [], 0
    for text in texts:
        if part and held + len(text) > size:
            yield part
            part, held = [], 0
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
