"""The run: batches in, records out. The same command continues a run.

A step is journaled before the next begins; on a GPU while the next runs, so that neither waits for the other.
"""

import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qzo import memory
from qzo.checkpoint import newest_snapshot, state_hash, write_snapshot
from qzo.data.batches import Batch, batch_indices, bucket, collate
from qzo.data.encode import Encoded, fingerprint, padding_id
from qzo.data.generation import Questions, per_example_f1
from qzo.data.loss import per_example_error, per_example_loss
from qzo.disk import disk_error
from qzo.errors import BadInput, Interrupted, OutOfMemory, RunFailed
from qzo.evaluate import evaluate_task
from qzo.fit import Fit
from qzo.inputs import load_data, quantized_folder
from qzo.journal import FLAG_CLIPPED, FLAG_SKIPPED, Journal, Record
from qzo.metrics import Counts, Metrics, cut_back, read_metrics
from qzo.model.decoder import is_plain
from qzo.model.load import LoadedModel, load_tokenizer
from qzo.progress import Progress, Steps, Still
from qzo.rebuild import build_targets, load_base, replay, units
from qzo.recipe import PIECES, Recipe, to_yaml
from qzo.report import write_report
from qzo.run import build_optimizer, changes, check_base, check_data, claim, keep_aside, make_header
from qzo.signals import StopSignals
from qzo.track import Tracker, check_tracker
from qzo.zo.graph import Graphs
from qzo.zo.optimizer import Measured
from qzo.zo.schedule import schedule

MAX_SKIPPED = 10
JUDGED = 20  # steps whose coefficients say whether the rest will move anything


class Tuner:
    """One run: `run` does what is left of it and returns the results. All input is checked before the weights are read.

    capture: on a GPU, steps are captured as CUDA graphs where the model allows it; the bits are the same without.
    """

    def __init__(self, recipe: Recipe, name: str, command: str, restart: bool = False, capture: bool = True):
        self.recipe, self.command, self.restart = recipe, command, restart
        self.folder, header = claim(recipe, name, restart)
        check_tracker(recipe.track)
        model, quantization = quantized_folder(recipe)
        if header:
            check_base(model, header)
        self.tokenizer = load_tokenizer(model)
        self.max_length = model.fit_length(recipe.max_length)
        self.train, self.validation, self.task = load_data(recipe, self.tokenizer, self.max_length)
        examples = fingerprint(self.train)
        if header:
            check_data(recipe, examples, header)
        threads = recipe.threads or (header["threads"] if header else None)
        if threads:
            torch.set_num_threads(threads)
        self.fit = Fit(recipe, model, quantization, self.train, len(self.validation), self.task.generation, header and header["micro_batch"])
        self.fit.check()
        memory.restrict(self.fit.device, recipe.device_memory)
        self.loaded: LoadedModel = load_base(recipe, recipe.device, recipe.dtype)
        self.targets = build_targets(recipe, self.loaded)
        self.optimizer = build_optimizer(recipe, self.targets, self.loaded.device)
        self.plain = is_plain(self.loaded.model, bucket(self.max_length))
        self.graphs = Graphs(self.optimizer, self._losses, capture and self.plain and recipe.objective != "f1", self.loaded.rest)
        self.late = int(self.loaded.device.type == "cuda")  # steps launched before the host reads one
        self.pending: deque[Measured] = deque()
        self.skipped = 0  # in a row
        self.sizes: list[np.ndarray] = []  # of the first coefficients, by target
        self.header = header or make_header(recipe, name, self.loaded, self.targets, examples, self.fit.micro)
        for said in changes(self.header, self.loaded, {"micro_batch": self.fit.micro, "stacked": recipe.stacked}):
            print(f"warning: {said}", file=sys.stderr)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value for target in self.targets for name, value in target.state().items()}

    def _open(self) -> Journal:
        """The journal, with the tuned tensors and the estimator brought to its last record."""
        if self.restart and (kept := keep_aside(self.folder)):
            print(f"the old run is kept in {kept}", file=sys.stderr)
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(str(self.folder.path), f"cannot be created ({error.strerror})", "a folder that can be written") from error
        new = not self.folder.journal.exists()
        journal = Journal.create(self.folder.journal, self.header) if new else Journal.open(self.folder.journal)
        try:
            self.folder.recipe.write_text(to_yaml(self.recipe), encoding="utf-8")
        except OSError as error:
            raise disk_error(self.folder.recipe, error) from error
        done, state = 0, self._state()
        found = newest_snapshot(self.folder.path, at_most=len(journal.records))
        if found:
            done = found[0]
            for name, value in state.items():
                value.copy_(found[1][name])
        replay(self.header, journal.records[done:], state, units(self.targets), device=self.loaded.device)
        for target in self.targets:
            target.load_state(state)
        if journal.records:
            self.optimizer.clip.observe(torch.from_numpy(np.concatenate([r.projected for r in journal.records])))
        self.optimizer.steps = len(journal.records)
        return journal

    def _open_metrics(self, records: list[Record]) -> Metrics:
        """metrics.jsonl with one line per record: later lines are cut off, those that a crash lost are written again."""
        cut_back(self.folder.metrics, len(records))
        last = next((m for m in reversed(read_metrics(self.folder.metrics)) if "tokens" in m), {})
        self.counts = Counts(*(last.get(key, 0) for key in ("examples", "tokens", "forwards", "seconds")))
        metrics = Metrics(self.folder.metrics)
        for record in records[last.get("step", -1) + 1 :]:
            self._log(metrics, record)
        return metrics

    def _rate(self, step: int) -> float:
        """The schedule's factor on every learning rate."""
        return schedule(self.recipe.schedule, 1.0, step, self.recipe.steps, self.recipe.warmup)

    def _examples(self, step: int) -> list[Encoded]:
        return [self.train[i] for i in batch_indices(self.recipe.seed, step, self.recipe.batch_size, len(self.train))]

    def _batch(self, step: int) -> list[Batch] | list[Questions]:
        """The step's micro-batches on the device."""
        examples, pad = self._examples(step), padding_id(self.tokenizer)
        parts = [examples[start : start + self.fit.micro] for start in range(0, len(examples), self.fit.micro)]
        if self.recipe.objective == "f1":
            return [Questions(tuple(part)) for part in parts]
        batches = [collate(part, pad).rounded() for part in parts]
        if (host := self.loaded.embedding) and self.plain:
            batches = [replace(batch, embedded=host.rows(batch.input_ids)) for batch in batches]
        return [batch.to(self.loaded.device) for batch in batches]

    def _measured(self, batch: Batch | Questions, variants: int) -> torch.Tensor:
        """The recipe's objective, to be lowered, of every example [variants, B]."""
        if isinstance(batch, Questions):
            return per_example_f1(self.loaded.model, self.tokenizer, batch, variants)
        measure = per_example_error if self.recipe.objective == "accuracy" else per_example_loss
        return measure(self.loaded.model, batch, variants)

    def _losses(self, batches: Sequence[Batch | Questions], variants: int = 1) -> torch.Tensor:
        """The mean objective over the examples of a step's micro-batches, fp32 [variants]."""
        total = torch.zeros(variants, device=self.loaded.device)
        for batch in batches:
            total += self._measured(batch, variants).sum(1).to(total.device)
        return total / sum(b.examples for b in batches)

    def launch(self) -> None:
        """Start one step: measure, estimate, update. What it measured stays pending."""
        for group, target in zip(self.optimizer.param_groups, self.targets, strict=True):
            group["lr"] = target.lr * self._rate(self.optimizer.steps)
        self.graphs.step(self._batch(self.optimizer.steps))
        self.pending.append(self.optimizer.newest)

    def settle(self, journal: Journal, metrics: Metrics, late: int = 0) -> list[Record]:
        """Read, journal and log the pending steps but the newest `late`, in order."""
        settled = []
        while len(self.pending) > late:
            last = self.pending[0].read()
            flags = FLAG_SKIPPED * last.skipped | FLAG_CLIPPED * last.clipped
            settled.append(record := Record(last.step, flags, last.loss, last.projected, last.coefs.reshape(-1)))
            journal.append(record)
            self.pending.popleft()
            self._log(metrics, record)
            self._judge(record)
            self.skipped = self.skipped + 1 if last.skipped else 0
        return settled

    def _judge(self, record: Record) -> None:
        """Warn, once, where steps of the size of the first ones would not do what they are meant to."""
        if len(self.sizes) == JUDGED:
            return
        self.sizes.append(np.abs(record.coefs).reshape(len(self.targets), -1).sum(1))
        if len(self.sizes) == JUDGED and (rate := self._rate(record.step)):
            left = round(sum(map(self._rate, range(record.step + 1, self.recipe.steps))) / rate)
            for target, size in zip(self.targets, np.median(self.sizes, 0), strict=True):
                if left and (said := target.warning(float(size), left)):
                    print(f"warning: {target.name}: {said}", file=sys.stderr)

    def _log(self, metrics: Metrics, record: Record) -> None:
        """The line of a step. Steps are logged in order."""
        counts, rows = self.counts, [row for example in self._examples(record.step) for row in example.rows]
        counts.examples += self.recipe.batch_size
        counts.tokens += sum(map(len, rows)) * 2 * self.recipe.directions
        counts.forwards += len(rows) * 2 * self.recipe.directions
        metrics.write(
            {
                "step": record.step, "loss": float(record.loss), "abs_d": float(np.abs(record.projected).mean()),
                "lr": self.targets[0].lr * self._rate(record.step),
                "clipped": bool(record.flags & FLAG_CLIPPED), "skipped": bool(record.flags & FLAG_SKIPPED),
                "examples": counts.examples, "tokens": counts.tokens, "forwards": counts.forwards,
                "seconds": round(counts.elapsed(), 3), "peak_memory": memory.peak(self.loaded.device),
            }  # fmt: skip
        )

    def evaluate(self, metrics: Metrics, stop: StopSignals) -> dict:
        """Score the validation examples under the tuned weights; a line in metrics.jsonl."""
        progress = Progress(f"evaluate at step {self.optimizer.steps}", len(self.validation))

        def shown(done: int, total: int) -> None:
            stop.check()
            progress.update(done)

        scores = evaluate_task(self.loaded.model, self.tokenizer, self.task, self.validation, self.max_length, self.fit.evaluation, shown)
        progress.close()
        at = torch.tensor([self.recipe.seed, self.optimizer.steps], device=self.loaded.device)
        moved = {target.name: found for target in self.targets if (found := target.statistics(at))}
        metrics.write({"after": self.optimizer.steps, "evaluation": scores, "peak_memory": memory.peak(self.loaded.device), **moved})
        return scores

    def snapshot(self, journal: Journal) -> None:
        journal.sync()
        state = self._state()
        write_snapshot(self.folder.path, self.optimizer.steps, state, {"state_sha256": state_hash(state)})

    def run(self) -> dict:
        """Tune to the last step, write snapshots on the way and the report at the end. Returns the report's figures."""
        header = self.header
        settings = header["recipe"] | {"base_sha256": header["base"]["sha256"], "device": header["device"]} | header["versions"]
        with Tracker(self.recipe.track, self.folder.path, f"{header['recipe_name']}-seed{header['seed']}", settings) as tracker:
            self._run(tracker)
            return write_report(self.folder, header, self.command, state_hash(self._state()), self.fit.estimate().phases)

    def _run(self, tracker: Tracker) -> None:
        do = "Everything learned is written; the same command continues."
        with (
            StopSignals(str(self.folder.path), do) as stop, self._open() as journal,
            self._open_metrics(journal.records) as metrics,
            Progress("tune", self.recipe.steps, self.optimizer.steps, every=0.0) as progress,
        ):  # fmt: skip
            try:
                metrics.listeners.append(tracker.start(self.folder.metrics))
                self._steps(journal, metrics, stop, progress)
            except Interrupted:
                self.settle(journal, metrics)
                self.snapshot(journal)
                raise
            except Exception as error:
                # Where these fail too, the first error is the one to show.
                with suppress(Exception):
                    self.settle(journal, metrics)
                if isinstance(error, torch.OutOfMemoryError):
                    raise self._out_of_memory(error) from error
                raise

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        room = f", {memory.gigabytes(self.fit.available)} available" if self.fit.available else ""
        given = f"out of memory ({str(error).splitlines()[0]}); {memory.gigabytes(self.fit.estimate().peak)} estimated{room}"
        do = f"Lower it: {self.fit.advice() or 'max_length, with --restart'}."
        return OutOfMemory(str(self.folder.path), given, "", f"{do} The same command continues the run, also with another {' or '.join(PIECES)}.")

    def _steps(self, journal: Journal, metrics: Metrics, stop: StopSignals, progress: Progress) -> None:
        recipe, evaluated = self.recipe, {m["after"] for m in read_metrics(self.folder.metrics) if "evaluation" in m}
        self.skipped, most = _skipped_tail(journal.records), min(MAX_SKIPPED, recipe.steps)
        metrics.listeners += [Steps(progress, recipe.log_every, recipe.steps, self.counts.tokens), Still(recipe.direction)]
        while (done := self.optimizer.steps) < recipe.steps:
            if done % (recipe.eval_every or recipe.steps) == 0 and done not in evaluated:
                progress.close()
                self.evaluate(metrics, stop)
            self.launch()
            done += 1
            rest = any(done % every == 0 for every in (recipe.save_every, recipe.eval_every or recipe.steps, recipe.steps))
            settled = self.settle(journal, metrics, 0 if rest else self.late)
            if settled and self.skipped >= most:
                self.settle(journal, metrics)
                self.snapshot(journal)
                said = f"{most} steps in a row without a finite loss"
                raise RunFailed(str(self.folder.path), said, "finite losses", "Lower lr or eps, or use dtype=fp32; then --restart.")
            if done % recipe.save_every == 0 and done < recipe.steps:
                self.snapshot(journal)
            stop.check()
        progress.close()
        found = newest_snapshot(self.folder.path)
        if found is None or found[0] != recipe.steps:
            self.snapshot(journal)
        if recipe.steps not in evaluated:
            self.evaluate(metrics, stop)


def _skipped_tail(records: list[Record]) -> int:
    return next((i for i, record in enumerate(reversed(records)) if not record.flags & FLAG_SKIPPED), len(records))


def tune_model(recipe: Recipe, name: str = "run", restart: bool = False, command: str = "qzo tune") -> tuple[Path, dict]:
    """Run a recipe, or continue it: (run folder, figures as `report.results` gives them).

    Raises BadInput, RunFailed, OutOfMemory, or Interrupted after everything learned has been written.
    """
    tuner = Tuner(recipe, name, command, restart)
    return tuner.folder.path, tuner.run()
