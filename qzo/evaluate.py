"""What a model can do: accuracy or EM and F1 on a task, and perplexity on a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qzo.data.answers import exact_match, f1
from qzo.data.batches import Batch, collate
from qzo.data.encode import Encoded, encode_examples, padding_id
from qzo.data.generation import answerable_prompts, first_lines
from qzo.data.loss import option_scores, per_example_loss
from qzo.data.messages import encode_chats
from qzo.data.tasks import Example, Task
from qzo.data.text import Windows, cut
from qzo.errors import BadInput

Progress = Callable[[int, int], None]  # (examples done, examples in all)

_WINDOWS_PER_BATCH = 4


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example] | Windows,
    max_length: int,
    batch_size: int,
    progress: Progress | None = None,
) -> dict:
    """The model's score on the examples, as a plain dict with "examples" and "truncated" (prompts cut to max_length).

    A task with options: "accuracy" (0 to 1; the highest score wins, the first of equals) and "loss" (nats, mean of
    per_example_loss). A generation task: "exact_match" and "f1" (0 to 1) of the first line that greedy decoding
    writes in at most 50 tokens, prompt and answer together at most max_length tokens. Chats: "loss" (nats, mean over
    the assistant's tokens), its exponential "perplexity", and "tokens", their number. Plain text, whose `examples` are
    Windows: the same over all predicted tokens.
    """
    if not examples:
        raise BadInput(f"task {task.name}", "no examples", "at least one")
    progress = progress or _silent
    run = _evaluate_chats if task.chat else _evaluate_generation if task.generation else _evaluate_options
    with _inference(model):
        if task.text:
            return {**_likelihood(model, tokenizer, examples, batch_size, progress), "examples": len(examples), "truncated": 0}
        return run(model, tokenizer, examples, max_length, batch_size, progress)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    window: int = 512,
    limit_windows: int | None = None,
) -> dict:
    """exp of the mean negative log-likelihood over the first `limit_windows` windows of a text file.

    The text is tokenised whole and cut into windows of `window` tokens that do not overlap (the rest is dropped);
    each gives window - 1 predictions. Returns perplexity, windows and tokens (the number of predictions).
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(file), f"cannot be read ({error})", "a UTF-8 text file") from None
    windows = cut([text], str(file), tokenizer, window, limit_windows)
    with _inference(model):
        found = _likelihood(model, tokenizer, windows, _WINDOWS_PER_BATCH, _silent)
    return {"perplexity": found["perplexity"], "windows": len(windows), "tokens": found["tokens"]}


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


def _exp(loss: float) -> float:
    # A model that is broken enough overflows exp: infinity is the honest value.
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _batches(lengths: Sequence[int], batch_size: int, progress: Progress) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: what does not fit into memory fails at once. Reports each when it is done."""
    ranked = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(ranked), batch_size):
        yield ranked[start : start + batch_size]
        progress(min(start + batch_size, len(ranked)), len(ranked))


def _collated(
    encoded: Sequence[Encoded], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress
) -> Iterator[tuple[list[int], Batch]]:
    """Such batches with their tensors on the model's device."""
    for indices in _batches([max(map(len, example.rows)) for example in encoded], batch_size, progress):
        yield indices, collate([encoded[index] for index in indices], padding_id(tokenizer)).to(model.device)


def _evaluate_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
    progress: Progress,
) -> dict:
    encoded, truncated = encode_examples(examples, tokenizer, max_length)
    losses = torch.zeros(len(encoded), dtype=torch.float64)
    right = 0
    for indices, batch in _collated(encoded, model, tokenizer, batch_size, progress):
        scores = option_scores(model, batch)
        losses[indices] = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="none").double().cpu()
        right += int((scores.argmax(1) == batch.labels).sum())
    return {
        "accuracy": right / len(encoded),
        "loss": losses.mean().item(),
        "examples": len(encoded),
        "truncated": truncated,
    }


def _evaluate_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
    progress: Progress,
) -> dict:
    encoded, truncated = encode_chats(examples, tokenizer, max_length)
    return {**_likelihood(model, tokenizer, encoded, batch_size, progress), "examples": len(encoded), "truncated": truncated}


def _likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], batch_size: int, progress: Progress
) -> dict:
    """Loss and perplexity over the tokens of the one option that each example has."""
    counts = torch.tensor([len(example.options[0].tokens) for example in encoded], dtype=torch.float64)
    losses = torch.zeros(len(encoded), dtype=torch.float64)
    for indices, batch in _collated(encoded, model, tokenizer, batch_size, progress):
        losses[indices] = per_example_loss(model, batch)[0].double().cpu()
    tokens = int(counts.sum())
    loss = ((losses * counts).sum() / tokens).item()
    return {"loss": loss, "perplexity": _exp(loss), "tokens": tokens}


def _evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
    progress: Progress,
) -> dict:
    prompts, truncated = answerable_prompts(examples, tokenizer, max_length)
    matches, overlaps = [0.0] * len(examples), [0.0] * len(examples)
    for indices in _batches([len(prompt) for prompt in prompts], batch_size, progress):
        answers = first_lines(model, tokenizer, [prompts[index] for index in indices])
        for index, answer in zip(indices, answers, strict=True):
            matches[index] = exact_match(answer, examples[index].references)
            overlaps[index] = f1(answer, examples[index].references)
    return {
        "exact_match": sum(matches) / len(examples),
        "f1": sum(overlaps) / len(examples),
        "examples": len(examples),
        "truncated": truncated,
    }
