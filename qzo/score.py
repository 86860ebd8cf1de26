"""What `qzo evaluate` does: pick the model or run, the task or text, and score it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qzo.data.records import located
from qzo.data.tasks import Task, get_task, load_examples
from qzo.data.text import documents, read_windows
from qzo.errors import BadInput
from qzo.evaluate import evaluate_task, perplexity
from qzo.inputs import task_of
from qzo.progress import Progress
from qzo.recipe import Recipe, load_recipe
from qzo.rebuild import load_any
from qzo.run import is_run, read_run, recipe_of


@dataclass(frozen=True)
class Question:
    """What to score: a task on data, or the perplexity of a text. None: the run's own, or the default."""

    task: str | None = None
    recipe: str | None = None
    perplexity: str | None = None
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    window: int = 512
    limit_windows: int | None = None
    max_length: int | None = None
    batch_size: int = 32


def score(model: str, question: Question, device: str = "auto", dtype: str | None = None) -> dict[str, Any]:
    """Figures of a 16-bit folder, a quantized folder, a hub id or a run. Cheap input is checked before the model is loaded."""
    run = is_run(model)
    if question.perplexity is None:
        task, read, max_length = _examples(model, question, run)
    else:
        text = located(question.perplexity)
        if not text.is_file():
            raise BadInput(question.perplexity, "no such file", "a UTF-8 text file for --perplexity")
    loaded, steps = load_any(model, device, dtype)
    tokenizer = loaded.tokenizer()
    if question.perplexity is not None:
        figures = perplexity(loaded.model, tokenizer, text, question.window, question.limit_windows)
    else:
        max_length = loaded.folder.fit_length(max_length)
        examples = read(tokenizer, max_length)
        with Progress("evaluate", len(examples)) as progress:
            figures = evaluate_task(
                loaded.model, tokenizer, task, examples, max_length, question.batch_size,
                lambda done, total: progress.update(done),
            )  # fmt: skip
    return figures if steps is None else {**figures, "steps": steps}


def _examples(model: str, question: Question, run: bool) -> tuple[Task, Callable[[Any, int], Sequence], int]:
    """The task, what makes its examples of a tokenizer and a length, and the length that is asked for."""
    own: Recipe | None = None
    if question.recipe:
        overrides = [f"data={question.data}"] if question.data else []
        own = load_recipe(question.recipe, overrides)
    elif run:
        own = recipe_of(read_run(model)[0], model)
    if own and question.task not in (None, own.task):
        own = None
    if own is None and (question.task is None or question.data is None):
        raise BadInput("evaluate", "nothing to evaluate", "--task NAME --data FOLDER, --recipe RECIPE, or --perplexity FILE")
    task = task_of(own) if own else get_task(question.task)
    data = question.data or own.data
    split = question.split or (own.eval_split if own else "validation")
    limit = question.limit or (own.eval_examples if own else None)
    streaming, max_length = bool(own and own.streaming), question.max_length or (own.max_length if own else 512)
    if task.text:
        next(documents(data, split, streaming), None)  # what cannot be read is said here, before the model is loaded
        return task, partial(read_windows, data, split, limit=limit, streaming=streaming), max_length
    examples = load_examples(task, data, split, limit, streaming)
    return task, lambda tokenizer, length: examples, max_length
