"""`qzo evaluate --lm-eval`: tasks of EleutherAI's lm-evaluation-harness on a live model, through its own HFLM."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzo.errors import BadInput
from qzo.model.files import one_line
from qzo.rebuild import load_any

WHERE = "--lm-eval"


def evaluate_harness(
    model: str, tasks: Sequence[str], device: str = "auto", dtype: str | None = None, limit: int | None = None, batch_size: int = 32,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Every number that the harness gives for `tasks`, as "TASK METRIC" ("TASK METRIC,FILTER" where a filter is set).

    model: a folder, a hub id or a run. tasks: names, groups, tags, or folders (with a /) of a user's own YAML tasks, all of which are run.
    limit: examples per task. Raises BadInput for a task that is not known, before the model is loaded, and for data that
    cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise BadInput(WHERE, "lm_eval is not installed", "the evaluation harness", "pip install 'qzo[lm-eval]'")
    manager, names = _tasks(tasks)
    loaded, steps = load_any(model, device, dtype)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    fits = None if max_length is None else loaded.folder.fit_length(max_length)
    live = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer(), batch_size=batch_size, max_length=fits)
    try:
        found = simple_evaluate(model=live, tasks=names, task_manager=manager, limit=limit, log_samples=False)
    except OSError as error:  # what `datasets` raises without a network, too
        raise BadInput(f"{WHERE} {','.join(tasks)}", f"the data of a task cannot be read ({one_line(error)})", "data here, or a network") from error
    figures = {
        f"{task} {metric.removesuffix(',none')}": value for task, metrics in sorted(found["results"].items())
        for metric, value in metrics.items() if isinstance(value, int | float) and metric != "sample_len"
    }  # fmt: skip
    return figures if steps is None else {**figures, "steps": steps}


def _tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """(the harness's TaskManager, the names of what to run)."""
    from lm_eval.tasks import TaskManager

    folders = [task for task in tasks if "/" in task and Path(task).is_dir()]
    names = [task for task in tasks if task and task not in folders]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    for name in names:
        if not manager.match_tasks([name]):
            raise BadInput(f"{WHERE} {name}", "neither a task that lm-eval knows nor a folder", "a name that `lm-eval ls tasks` lists, or a folder of YAML tasks")
    for folder in folders:
        own = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not own:
            raise BadInput(f"{WHERE} {folder}", "a folder without tasks", "YAML files with `task:`")
        names += own
    if not names:
        raise BadInput(WHERE, "no task", "names of tasks, or folders of YAML tasks, between commas")
    return manager, names
