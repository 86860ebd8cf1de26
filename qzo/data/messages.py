"""Chats by the tokenizer's own template: their token ids, and which of them are the assistant's.

A template with generation markers says so itself. Of any other, turn i is what rendering messages[: i + 1] adds to messages[:i]
and the part of the generation prompt that follows it, if both are beginnings of the whole.
"""

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from qzo.data.encode import Encoded, Scattered, common_prefix, token_ids
from qzo.data.tasks import Example
from qzo.errors import BadInput

ASSISTANT = "assistant"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date. A run's data must be the same tomorrow; the date is the default of Llama's templates.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
_CLOCK = "{%- macro strftime_now(format) %}{{ format" + "".join(f" | replace('{k}', '{v}')" for k, v in _DATE.items()) + " }}{% endmacro %}{{- '' }}"

Messages = list[dict[str, str]]


def encode_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], int]:
    """Every chat as one row with one option, the tokens of all the assistant's turns; and how many chats were cut.

    What follows the last of them is left out; of what is longer than `max_length` tokens the beginning is, behind a BOS.
    What a template writes behind a turn (its end token, a newline) is the turn's. BadInput (where the example was
    read): no token of the assistant, or a template that cannot render the chat or gives no way to find the turns.
    """
    template = _template(tokenizer)
    marked = _MARKER.search(template) is not None and tokenizer.is_fast
    encoded, truncated = [], 0
    for number, example in enumerate(examples):
        where = example.source or f"example {number}"
        messages = [{"role": role, "content": content} for role, content in example.messages]
        find = _marked if marked else _by_prefixes
        ids, ours = find(messages, tokenizer, template, where)
        ours = [i for i in ours if i > 0]  # nothing predicts the first
        if not ours:
            do = "Leave the record out." if marked or all(m["role"] != ASSISTANT for m in messages) else ""
            raise BadInput(where, "no token of the assistant", f"a message of the role {ASSISTANT} with some text", do)
        one, cut = _encoded(ids, ours, tokenizer.bos_token_id, max_length)
        encoded.append(one)
        truncated += cut
    return encoded, truncated


def _encoded(ids: list[int], ours: list[int], bos: int | None, max_length: int) -> tuple[Encoded, bool]:
    stop = ours[-1] + 1
    kept = int(bos is not None and ids[0] == bos)
    cut = max(0, stop - max_length)
    row = (*ids[:kept], *ids[kept + cut : stop])
    targets = [i - cut for i in ours if i - cut >= max(1, kept)]
    option = Scattered(0, tuple(i - 1 for i in targets), tuple(row[i] for i in targets))
    return Encoded((row[:-1],), (option,), 0), cut > 0


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        given = "no chat template" if not tokenizer.chat_template else "several chat templates and none called default"
        do = "Put the chat_template.jinja of the model's chat version beside the weights, or use task=jsonl."
        raise BadInput("tokenizer", given, "one chat template, for task messages", do) from error
    return _CLOCK + template if "strftime_now" in template else template


def _rendered(where: str, apply: Callable[[], object]) -> object:
    try:
        return apply()
    except Exception as error:  # a template is code of its author: it may fail in any way
        given = f"the tokenizer's chat template cannot render it ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise BadInput(where, given, "messages in the order and with the roles that the template takes") from error


def _marked(messages: Messages, tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> tuple[list[int], list[int]]:
    found = _rendered(where, lambda: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    ))  # fmt: skip
    return found["input_ids"], [i for i, ours in enumerate(found["assistant_masks"]) if ours]


def _by_prefixes(messages: Messages, tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> tuple[list[int], list[int]]:
    def render(part: Messages, prompt: bool = False) -> str:
        return _rendered(where, lambda: tokenizer.apply_chat_template(
            part, chat_template=template, tokenize=False, add_generation_prompt=prompt,
        ))  # fmt: skip

    whole, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if i == 0:
            raise BadInput(where, f"the first message is the {ASSISTANT}'s", "another before it, for the tokenizer's template marks no turns")
        before, asked, through = render(messages[:i]), render(messages[:i], True), render(messages[: i + 1])
        if not (through.startswith((before, asked)) and whole.startswith(through)):
            given = f"the tokenizer's chat template renders the chat up to message {i + 1} otherwise when more follows, and marks no turns"
            do = f"Put {{% generation %}} … {{% endgeneration %}} around the {ASSISTANT}'s part of the template, or give chats of one turn."
            raise BadInput(where, given, "a template by which the beginning of a chat is the beginning of the text", do)
        # A generation prompt may go on with what the answer need not hold (<think>).
        known = common_prefix(asked, through)
        spans += [max(len(before), known) if through.startswith(before) else known, len(through)]
    ids, *parts = token_ids([whole, *(whole[:end] for end in spans)], tokenizer)
    ends = [common_prefix(part, ids) for part in parts]
    turns = zip(ends[::2], ends[1::2], strict=True)
    return ids, [i for start, end in turns for i in range(start, end)]

