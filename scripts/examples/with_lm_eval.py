"""lm-evaluation-harness on a live model, before and after some steps: with_lm_eval.py MODEL TEXTS TASK_FOLDER STEPS."""

import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import qzo

name, texts, tasks, steps = sys.argv[1:]
loaded = qzo.load_model(name)
model, tokenizer = loaded.model, loaded.tokenizer()
manager = TaskManager(include_path=tasks, include_defaults=False)
live = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=None)
zo = qzo.ZO([qzo.Scales(qzo.prepare(model), eps=0.03, lr=0.01)], seed=0)
lines = open(texts).read().splitlines()
for step in range(int(steps) + 1):
    if step in (0, int(steps)):
        found = simple_evaluate(model=live, tasks=manager.all_subtasks, task_manager=manager, limit=None, log_samples=False)
        print(f"after {step} steps:", {task: scores["acc,none"] for task, scores in found["results"].items()})
    ids = tokenizer(lines[step % len(lines)], return_tensors="pt")["input_ids"].to(model.device)
    zo.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
