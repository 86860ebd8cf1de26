"""Token ids of a prompt and its options: what the model runs, and which of its predictions count."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from qzo.data.tasks import Example
from qzo.errors import BadInput


@dataclass(frozen=True)
class Option:
    """`tokens[i]` is predicted at position `start + i` of row `row`."""

    row: int
    start: int
    tokens: tuple[int, ...]

    @property
    def places(self) -> Sequence[int]:
        return range(self.start, self.start + len(self.tokens))


@dataclass(frozen=True)
class Scattered:
    """An option in pieces: `tokens[i]` is predicted at position `places[i]` of row `row`; ascending."""

    row: int
    places: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """The rows to run and the options to score in them. An option's last token is a target only, never in a row."""

    rows: tuple[tuple[int, ...], ...]
    options: tuple[Option | Scattered, ...]
    label: int


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], int]:
    """Every example in token ids, and how many prompts were cut to fit prompt and answer into `max_length` tokens.

    An option's tokens are those of prompt + option after the longest common prefix with the prompt's own tokens.
    Prompts are cut on the left, behind a BOS that the tokenizer adds, by the same number of tokens for every
    option; answers never. Options of one token after the same prefix share one row, others have a row each.
    BadInput (where the example was read): an answer that does not fit, or options that no token tells apart.
    """
    bos = leading_ids(tokenizer)
    texts = [text for e in examples for text in (e.prompt, *(e.prompt + option for option in e.options))]
    ids = iter(token_ids(texts, tokenizer))
    encoded, truncated = [], 0
    for number, example in enumerate(examples):
        prompt = next(ids)
        fulls = [next(ids) for _ in example.options]
        where = example.source or f"example {number}"
        _check_distinct(example, fulls, where)
        starts = [common_prefix(prompt, full) for full in fulls]
        cut = max(0, len(bos) + max(map(len, fulls)) - max_length)
        for start, full, option in zip(starts, fulls, example.options, strict=True):
            if len(full) == start or len(bos) + start - cut < 1:
                raise _unscorable(where, option, len(full) - start, max_length)
        truncated += cut > 0
        rows = [[*bos, *full[cut:]] for full in fulls]
        encoded.append(_encoded(rows, [len(bos) + start - cut for start in starts], example.label))
    return encoded, truncated


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """The prompts alone, for generation, cut on the left to `max_length` tokens, and how many were cut."""
    bos = leading_ids(tokenizer)
    prompts = token_ids([example.prompt for example in examples], tokenizer)
    room = max_length - len(bos)
    truncated = sum(len(prompt) > room for prompt in prompts)
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if not bos and not prompt:
            raise BadInput(example.source or f"example {number}", "an empty prompt", "at least one token to go on from")
    return [[*bos, *prompt[max(0, len(prompt) - room) :]] for prompt in prompts], truncated


def fingerprint(encoded: Sequence[Encoded]) -> str:
    """SHA-256 of the examples as a run sees them: their token ids, options and labels, in order."""
    found = hashlib.sha256()
    for number, example in enumerate(encoded):
        found.update(("\n" * (number > 0) + repr(example)).encode())
    return found.hexdigest()


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts one before a text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with; no prediction of a real token ever sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Those of each text, with nothing added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def common_prefix(one: Iterable, two: Iterable) -> int:
    """How many elements both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _encoded(rows: list[list[int]], starts: list[int], label: int) -> Encoded:
    """`starts[i]` is the place of option i's first token in `rows[i]`; it is predicted one position earlier."""
    prefixes = {tuple(row[:start]) for row, start in zip(rows, starts, strict=True)}
    shared = len(prefixes) == 1 and all(len(row) == start + 1 for row, start in zip(rows, starts, strict=True))
    options = tuple(
        Option(0 if shared else index, start - 1, tuple(row[start:]))
        for index, (row, start) in enumerate(zip(rows, starts, strict=True))
    )
    return Encoded(tuple(tuple(row[:-1]) for row in (rows[:1] if shared else rows)), options, label)


def _check_distinct(example: Example, fulls: list[list[int]], where: str) -> None:
    for second, full in enumerate(fulls):
        first = fulls.index(full)
        if first != second:
            raise BadInput(
                where,
                f"cannot tell apart the options {example.options[first]!r} and {example.options[second]!r}: "
                "the tokenizer gives both the same ids",
                "options that differ in at least one token",
            )


def _unscorable(where: str, option: str, tokens: int, max_length: int) -> BadInput:
    if tokens == 0:
        return BadInput(where, f"the option {option!r} adds no token to the prompt", "at least one token per option")
    return BadInput(
        where,
        f"the option {option[:80]!r} of {tokens} tokens leaves no token of context before it",
        f"a prompt, and answers shorter than max_length = {max_length}",
        "Raise max_length or shorten the answer.",
    )
