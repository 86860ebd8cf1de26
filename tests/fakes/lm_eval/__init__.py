"""The part of lm-evaluation-harness 0.4.13 that qzo calls, for where the package is not installed: multiple choice from local JSON lines."""

import json
from pathlib import Path

import torch
from jinja2 import Template

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def simple_evaluate(model: HFLM, tasks: list, task_manager: TaskManager, limit: int | None, log_samples: bool) -> dict:
    assert not log_samples
    return {"results": {name: _accuracy(model, task_manager.index[name], limit) for name in tasks}}


def _accuracy(model: HFLM, config: dict, limit: int | None) -> dict:
    lines = Path(config["dataset_kwargs"]["data_files"][config["validation_split"]]).read_text().splitlines()
    right = []
    for record in map(json.loads, lines[:limit]):
        prompt = Template(config["doc_to_text"]).render(**record)
        scores = [model.loglikelihood(prompt, " " + choice) for choice in config["doc_to_choice"]]
        right.append(scores.index(max(scores)) == record[config["doc_to_target"]])
    acc = torch.tensor(right, dtype=torch.float64)
    return {"alias": config["task"], "sample_len": len(right), "acc,none": acc.mean().item(), "acc_stderr,none": (acc.std() / len(acc) ** 0.5).item()}
