"""Tasks: how a record becomes a prompt and its options. The built-in prompts are those of MeZO (arXiv 2305.17333)."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qzo.data import templates
from qzo.data.permutation import subset
from qzo.data.records import read_records
from qzo.data.templates import RecordError, compile_template, text
from qzo.errors import BadInput


@dataclass(frozen=True)
class Example:
    """One question: each option is appended verbatim to the prompt; `label` is the index of the right one.

    A generation example has one option, the first of its `references`. A chat has `messages` (role, content) and nothing
    else, a document of plain text only a prompt. `source` says where it was read.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    references: tuple[str, ...] = ()
    source: str = field(default="", compare=False)
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """`make` turns a record into an Example; `generation`: judged by generated text, not by the options' scores.

    chat, text: neither, but by the likelihood of what the assistant says, or of all of a text (qzo.data.text).
    """

    name: str
    generation: bool
    make: Callable[[dict], Example]
    chat: bool = False
    text: bool = False


def get_task(
    name: str,
    prompt: str | None = None,
    choices: Sequence[str] | None = None,
    label: str | None = None,
    completion: str | None = None,
) -> Task:
    """A built-in task by name; "messages": chats; "text": plain text; or "jsonl": any records, described by the other arguments.

    prompt: template. choices: templates of the options, with `label` the field (default "label") that holds the
    index or the text of the right one. completion: template, or the name of a field. Neither: the record's own
    fields "prompt" and "completion". BadInput for an unknown name or settings that contradict each other.
    """
    arguments = {"prompt": prompt, "choices": choices, "label": label, "completion": completion}
    settings = [key for key, value in arguments.items() if value is not None]
    if name == "jsonl":
        return _jsonl_task(prompt, choices, label, completion)
    names = [*_BUILT_IN, "jsonl", "messages", "text"]
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        raise BadInput("task", repr(name), "one of " + ", ".join(names), f"Did you mean {close[0]}?" if close else "")
    if settings:
        why = {"messages": "its prompt is the tokenizer's template", "text": "it has no prompt"}.get(name, "its prompt is built in")
        raise BadInput(f"task {name}", f"{', '.join(settings)} set", f"no such setting: {why}", "Use task: jsonl.")
    if name == "messages":
        return Task(name, False, _chat, chat=True)
    if name == "text":
        return Task(name, False, lambda record: Example(text(record, "text"), (), 0), text=True)
    return Task(name, name in _GENERATION, _BUILT_IN[name])


def _chat(record: dict) -> Example:
    messages = templates.field(record, "messages")
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages is empty" if messages == [] else f"messages is {type(messages).__name__}", 'a list of {"role": …, "content": …}')
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise RecordError(f"message {number} has no text {key!r}", "role and content of every message, as text")
    return Example("", (), 0, messages=tuple((message["role"], message["content"]) for message in messages))


def load_examples(
    task: Task, data: str | Path, split: str, limit: int | None = None, streaming: bool = False
) -> list[Example]:
    """The examples of a split of `data` (a folder, a .jsonl file or a hub id: see read_records).

    limit: of the split "train", the first `limit` of one fixed random order, a function of nothing but the number of
    records; of any other split, and where `streaming`, the first `limit` of the file, and nothing behind them is read.
    Memory is for `limit` records, whatever the file has. BadInput names file and line of a record that the task cannot use.
    """
    drawn = limit is not None and split == "train" and not streaming
    choose = partial(subset, limit) if drawn else None
    return [made(task, *record) for record in read_records(data, split, None if drawn else limit, choose, streaming)]


def made(task: Task, where: str, record: dict) -> Example:
    """The Example of a record that was read at `where`; BadInput names that place."""
    try:
        return replace(task.make(record), source=where)
    except RecordError as error:
        raise BadInput(f"{where} (task {task.name})", error.given, error.expected) from None


def _index(record: dict, options: Sequence[str], name: str = "label") -> int:
    """The option that field `name` points at: an index, or the option's own text."""
    value = templates.field(record, name)
    if isinstance(value, int) and 0 <= value < len(options):
        return int(value)
    words = [option.strip() for option in options]
    if isinstance(value, str) and words.count(value.strip()) == 1:
        return words.index(value.strip())
    given = f"{name} is {value!r}" + (" (an unlabelled split?)" if value in (-1, None) else "")
    raise RecordError(given, f"0 to {len(options) - 1}, or one of {', '.join(map(repr, words))}")


def _choice(record: dict, prompt: str, *options: str, label: str = "label") -> Example:
    return Example(prompt, options, _index(record, options, label))


def _sst2(record: dict) -> Example:
    return _choice(record, f"{text(record, 'sentence').strip()} It was", " terrible", " great")


def _rte(record: dict) -> Example:
    premise, hypothesis = text(record, "premise"), text(record, "hypothesis")
    return _choice(record, f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', "Yes", "No")


def _cb(record: dict) -> Example:
    premise, hypothesis = text(record, "premise"), text(record, "hypothesis")
    prompt = f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
    return _choice(record, prompt, "Yes", "No", "Maybe")


def _boolq(record: dict) -> Example:
    question = text(record, "question")
    if not question.endswith("?"):
        question += "?"
    prompt = f"{text(record, 'passage')} {question[0].upper()}{question[1:]}\n"
    return _choice(record, prompt, "No", "Yes", label="answer" if "answer" in record else "label")


def _copa(record: dict) -> Example:
    joints = {"effect": " so", "cause": " because"}
    kind = text(record, "question")
    if kind not in joints:
        raise RecordError(f"question is {kind!r}", "effect or cause")
    prompt = text(record, "premise").rstrip().removesuffix(".") + joints[kind]
    # The space that MeZO has at the prompt's end goes with the option: a tokenizer keeps a space with its word.
    return _choice(record, prompt, *(" " + _lower_first(text(record, name)) for name in ("choice1", "choice2")))


def _lower_first(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _wic(record: dict) -> Example:
    word, one, two = (text(record, name) for name in ("word", "sentence1", "sentence2"))
    prompt = f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{one}\n{two}\n'
    return _choice(record, prompt, "No", "Yes")


def _squad(record: dict) -> Example:
    answers = templates.field(record, "answers")
    references = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(references, list) or not references or not all(isinstance(a, str) for a in references):
        raise RecordError("answers hold no text", 'a list of answers, or {"text": [...]}')
    title, context, question = (text(record, name) for name in ("title", "context", "question"))
    prompt = f"Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:"
    return Example(prompt, (f" {references[0]}\n",), 0, tuple(references))


_BUILT_IN: dict[str, Callable[[dict], Example]] = {
    "sst2": _sst2, "rte": _rte, "cb": _cb, "boolq": _boolq, "copa": _copa, "wic": _wic, "squad": _squad,
}  # fmt: skip
_GENERATION = ("squad",)


def _jsonl_task(
    prompt: str | None, choices: Sequence[str] | None, label: str | None, completion: str | None
) -> Task:
    where = "task jsonl"
    if choices is not None and completion is not None:
        raise BadInput(where, "both choices and completion", "one of them")
    if choices is None and label is not None:
        raise BadInput(where, "label without choices", "choices, the options that the label points at")
    render = compile_template("{prompt}" if prompt is None else prompt, f"{where}, prompt")
    if choices is None:
        answer = "completion" if completion is None else completion
        template = answer if "{" in answer or "}" in answer else f"{{{answer}}}"
        complete = compile_template(template, f"{where}, completion")

        def make(record: dict) -> Example:
            target = complete(record)
            return Example(render(record), (target,), 0, (target.strip(),))

        return Task("jsonl", True, make)

    if isinstance(choices, str) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise BadInput(where, f"choices {choices!r}", "a list of at least two texts")
    options = [compile_template(choice, f"{where}, choices") for choice in choices]

    def make_choice(record: dict) -> Example:
        return _choice(record, render(record), *(option(record) for option in options), label=label or "label")

    return Task("jsonl", False, make_choice)
