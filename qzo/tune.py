"""The run: batches in, records out. A step is journaled before the next begins; the same command continues a run."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from qzo import memory
from qzo.checkpoint import newest_snapshot, state_hash, write_snapshot
from qzo.data.batches import Batch, batch_indices, collate
from qzo.data.encode import Encoded, encode_examples, padding_id
from qzo.data.loss import per_example_loss
from qzo.data.tasks import Example, Task, get_task, load_examples
from qzo.errors import BadInput, Interrupted, RunFailed
from qzo.evaluate import evaluate_task
from qzo.journal import FLAG_CLIPPED, FLAG_SKIPPED, Journal, Record, read_journal
from qzo.metrics import Metrics, cut_back, read_metrics
from qzo.model.load import LoadedModel, load_model
from qzo.progress import Progress
from qzo.recipe import Recipe, default_output_dir, diff, to_yaml
from qzo.report import write_report
from qzo.run import RunFolder, build_optimizer, build_targets, check_base, make_header, replay
from qzo.signals import StopSignals
from qzo.zo.schedule import schedule

MAX_SKIPPED = 10


def task_of(recipe: Recipe) -> Task:
    return get_task(recipe.task, recipe.prompt, recipe.choices, recipe.label, recipe.completion)


def run_folder(recipe: Recipe, name: str) -> RunFolder:
    return RunFolder(Path(recipe.output_dir or default_output_dir(recipe, name)))


def check_same_recipe(folder: RunFolder, recipe: Recipe) -> dict | None:
    """The header of the run in `folder`, None when there is no run yet. Raises BadInput, with a diff, for another recipe."""
    if not folder.journal.exists():
        return None
    header, _ = read_journal(folder.journal)
    lines = diff(header["recipe"], recipe.model_dump())
    if lines:
        raise BadInput(
            str(folder.path), "a run with another recipe\n  " + "\n  ".join(lines), "the same recipe to continue it",
            "Undo the change, choose another output_dir, or add --restart to start over (the old folder is kept).",
        )  # fmt: skip
    return header


def keep_aside(folder: RunFolder) -> Path | None:
    """Move an existing run folder out of the way, under the first free name."""
    if not folder.path.exists():
        return None
    number = 1
    while (other := folder.path.with_name(f"{folder.path.name}.old{number}")).exists():
        number += 1
    return folder.path.rename(other)


def load_data(recipe: Recipe, tokenizer: object) -> tuple[list[Encoded], list[Example], Task]:
    """Training examples as token ids, evaluation examples, and the task. Warns about prompts that were cut."""
    task = task_of(recipe)
    train = load_examples(task, recipe.data, recipe.train_split, recipe.train_examples)
    encoded, truncated = encode_examples(train, tokenizer, recipe.max_length)
    if truncated:
        print(f"warning: {truncated} of {len(train)} prompts lost their beginning (max_length={recipe.max_length})", file=sys.stderr)
    return encoded, load_examples(task, recipe.data, recipe.eval_split, recipe.eval_examples), task


@dataclass
class Counts:
    """Sums over the steps so far, as metrics.jsonl shows them."""

    examples: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


class Tuner:
    """One run: `run` does what is left of it and returns the results. Built after the cheap checks have passed."""

    def __init__(self, recipe: Recipe, name: str, command: str):
        self.recipe, self.name, self.command = recipe, name, command
        self.folder = run_folder(recipe, name)
        header = check_same_recipe(self.folder, recipe)
        threads = recipe.threads or (header["threads"] if header else None)
        if threads:
            torch.set_num_threads(threads)
        self.loaded: LoadedModel = load_model(recipe.model, recipe.device, recipe.dtype)
        if not self.loaded.layers:
            raise BadInput(recipe.model, "a model that is not quantized", "a GPTQ checkpoint",
                           f"Quantize it first: qzo quantize {recipe.model} -o OUT, then model=OUT.")  # fmt: skip
        self.tokenizer = self.loaded.tokenizer()
        self.train, self.validation, self.task = load_data(recipe, self.tokenizer)
        self.targets = build_targets(recipe, self.loaded)
        self.optimizer = build_optimizer(recipe, self.targets)
        self.header = header or make_header(recipe, name, self.loaded, self.targets)
        if header:
            check_base(self.loaded.folder, header)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value for target in self.targets for name, value in target.state().items()}

    def _open(self) -> Journal:
        """The journal, with the tuned tensors, the estimator and metrics.jsonl brought to its last record."""
        if not self.folder.journal.exists():
            self.folder.path.mkdir(parents=True, exist_ok=True)
            journal = Journal.create(self.folder.journal, self.header)
        else:
            journal = Journal.open(self.folder.journal)
        self.folder.recipe.write_text(to_yaml(self.recipe), encoding="utf-8")
        done, state = 0, self._state()
        found = newest_snapshot(self.folder.path, at_most=len(journal.records))
        if found:
            done = found[0]
            for name, value in state.items():
                value.copy_(found[1][name])
        replay(self.header, journal.records[done:], state)
        for target in self.targets:
            target.load_state(state)
        for record in journal.records:
            self.optimizer.clip.observe(record.projected)
        self.optimizer.steps = len(journal.records)
        cut_back(self.folder.metrics, len(journal.records))
        last = next((m for m in reversed(read_metrics(self.folder.metrics)) if "tokens" in m), {})
        self.counts = Counts(*(last.get(key, 0) for key in ("examples", "tokens", "forwards", "seconds")))
        return journal

    def _batch(self, step: int) -> list[Batch]:
        """The step's micro-batches on the device."""
        indices = batch_indices(self.recipe.seed, step, self.recipe.batch_size, len(self.train))
        size = self.recipe.micro_batch or len(indices)
        pad = padding_id(self.tokenizer)
        parts = [[self.train[i] for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        return [collate(part, pad).to(self.loaded.device) for part in parts]

    def _closure(self, batches: list[Batch]) -> Callable[..., torch.Tensor]:
        examples = sum(b.examples for b in batches)

        def closure(variants: int = 1) -> torch.Tensor:
            total = torch.zeros(variants, device=self.loaded.device)
            for batch in batches:
                total += per_example_loss(self.loaded.model, batch, variants).sum(1)
            return total / examples

        return closure

    def step(self, journal: Journal, metrics: Metrics) -> Record:
        """Measure, apply, journal and log one step."""
        step = self.optimizer.steps
        factor = schedule(self.recipe.schedule, 1.0, step, self.recipe.steps, self.recipe.warmup)
        for group, target in zip(self.optimizer.param_groups, self.targets, strict=True):
            group["lr"] = target.lr * factor
        batches = self._batch(step)
        self.optimizer.step(self._closure(batches))
        last = self.optimizer.last
        flags = FLAG_SKIPPED * last.skipped | FLAG_CLIPPED * last.clipped
        record = Record(step, flags, last.loss, last.projected, last.coefs.reshape(-1))
        journal.append(record)
        counts = self.counts
        counts.examples += sum(b.examples for b in batches)
        counts.tokens += sum(b.tokens for b in batches) * 2 * self.recipe.directions
        counts.forwards += sum(b.rows for b in batches) * 2 * self.recipe.directions
        metrics.write(
            {
                "step": step, "loss": float(last.loss), "abs_d": float(np.abs(last.projected).mean()),
                "lr": self.optimizer.param_groups[0]["lr"], "clipped": last.clipped, "skipped": last.skipped,
                "examples": counts.examples, "tokens": counts.tokens, "forwards": counts.forwards,
                "seconds": round(counts.elapsed(), 3), "peak_memory": memory.peak(self.loaded.device),
            }  # fmt: skip
        )
        return record

    def evaluate(self, metrics: Metrics, stop: StopSignals) -> dict:
        """Score the validation examples under the tuned weights; a line in metrics.jsonl."""
        progress = Progress(f"evaluate at step {self.optimizer.steps}", len(self.validation))

        def shown(done: int, total: int) -> None:
            stop.check()
            progress.update(done)

        size = max(self.recipe.batch_size, 32)
        scores = evaluate_task(self.loaded.model, self.tokenizer, self.task, self.validation, self.recipe.max_length, size, shown)
        progress.close()
        metrics.write({"after": self.optimizer.steps, "evaluation": scores})
        return scores

    def snapshot(self, journal: Journal) -> None:
        journal.sync()
        state = self._state()
        write_snapshot(self.folder.path, self.optimizer.steps, state, {"state_sha256": state_hash(state)})

    def run(self) -> dict:
        """Tune to the last step, write snapshots on the way and the report at the end. Returns the report's figures."""
        do = "Everything learned is written; the same command continues."
        with StopSignals(str(self.folder.path), do) as stop, self._open() as journal, Metrics(self.folder.metrics) as metrics:
            try:
                self._steps(journal, metrics, stop)
            except Interrupted:
                self.snapshot(journal)
                raise
        return write_report(self.folder, self.header, self.command, state_hash(self._state()))

    def _steps(self, journal: Journal, metrics: Metrics, stop: StopSignals) -> None:
        recipe, evaluated = self.recipe, {m["after"] for m in read_metrics(self.folder.metrics) if "evaluation" in m}
        if 0 not in evaluated and self.optimizer.steps == 0:
            self.evaluate(metrics, stop)
        skipped = _skipped_tail(journal.records)
        progress = Progress("tune", recipe.steps, self.optimizer.steps)
        while self.optimizer.steps < recipe.steps:
            record = self.step(journal, metrics)
            done = self.optimizer.steps
            if done % recipe.log_every == 0 or done == recipe.steps:
                progress.update(done, loss=f"{record.loss:.4f}", d=f"{np.abs(record.projected).mean():.3g}",
                                lr=f"{self.optimizer.param_groups[0]['lr']:.3g}")  # fmt: skip
            skipped = skipped + 1 if record.flags & FLAG_SKIPPED else 0
            if skipped == MAX_SKIPPED:
                self.snapshot(journal)
                raise RunFailed(str(self.folder.path), f"{MAX_SKIPPED} steps in a row without a finite loss", "finite losses",
                                "Lower lr or eps, or use dtype=fp32; then --restart.")  # fmt: skip
            if done % recipe.save_every == 0 and done < recipe.steps:
                self.snapshot(journal)
            if recipe.eval_every and done % recipe.eval_every == 0 and done < recipe.steps:
                self.evaluate(metrics, stop)
            stop.check()
        progress.close()
        found = newest_snapshot(self.folder.path)
        if found is None or found[0] != recipe.steps:
            self.snapshot(journal)
        if recipe.steps not in evaluated:
            self.evaluate(metrics, stop)


def _skipped_tail(records: list[Record]) -> int:
    count = 0
    for record in reversed(records):
        if not record.flags & FLAG_SKIPPED:
            break
        count += 1
    return count


def tune_model(recipe: Recipe, name: str = "run", restart: bool = False, command: str = "qzo tune") -> tuple[Path, dict]:
    """Run a recipe, or continue it: (run folder, figures as `report.results` gives them).

    Raises BadInput, RunFailed, OutOfMemory, or Interrupted after everything learned has been written.
    """
    folder = run_folder(recipe, name)
    if restart and (kept := keep_aside(folder)):
        print(f"the old run is kept in {kept}", file=sys.stderr)
    return folder.path, Tuner(recipe, name, command).run()
