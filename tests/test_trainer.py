"""transformers' Trainer and Accelerate around ZO: the same steps as in a loop by hand, to the bit."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import qzo
from qzo.errors import BadInput
from qzo.model.load import load_model
from qzo.trainer import FIXED, ZOTrainer
from qzo.zo.estimator import Clip

STEPS = 6


@pytest.fixture(scope="module")
def rows():
    """24 examples of 10 tokens."""
    ids = torch.randint(1, 256, (24, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Case:
    """A model of a test's own with its ZO, and the Trainer's arguments."""

    def __init__(self, folder, tmp_path, rows, reader=None):
        self.model = (reader or (lambda path: load_model(str(path), "cpu", "fp32").model))(folder)
        self.scales = qzo.Scales(qzo.prepare(self.model), eps=0.03, lr=0.05)
        self.zo = qzo.ZO([self.scales], seed=3, clip=Clip(multiple=3))
        self.out, self.rows = tmp_path / "trainer", rows

    def arguments(self, **keys):
        given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
                 "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", **keys}  # fmt: skip
        return TrainingArguments(str(self.out), **given)

    def trainer(self, callbacks=None, **keys):
        return ZOTrainer(self.model, self.arguments(**keys), train_dataset=self.rows, eval_dataset=self.rows, optimizers=(self.zo, None), callbacks=callbacks)

    def bytes(self):
        return b"".join(layer.scales.detach().numpy().tobytes() for layer in self.scales.layers.values())


@pytest.fixture
def case(llama4, tmp_path, rows):
    return lambda name="a", **options: Case(llama4, tmp_path / name, rows, **options)


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_step_of_the_trainer_is_a_step_by_hand(case):
    first = case()
    trainer = first.trainer()
    trainer.train()
    second = case()
    seen = []
    for batch in list(first.trainer().get_train_dataloader())[:STEPS]:
        seen.append(float(second.zo.step(lambda batch=batch: second.model(**batch).loss)))
    assert losses(trainer) == pytest.approx(seen, abs=1e-4)
    assert first.bytes() == second.bytes() and first.zo.steps == STEPS
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["abs_d"] > 0 and line["learning_rate"] == 0.05 and "grad_norm" not in line


@pytest.mark.parametrize("reader", ["load_model", "from_pretrained"])
def test_resume_is_the_run_that_was_not_stopped(reader, case, llama4):
    options = {} if reader == "load_model" else {"reader": lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)}
    keys = {"lr_scheduler_type": "linear", "warmup_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = case("whole", **options)
    expected = whole.trainer(**keys)
    expected.train()
    rates = [line["learning_rate"] for line in expected.state.log_history if "loss" in line]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.0375, 0.025, 0.0125])
    again = case("again", **options)
    trainer = again.trainer(**keys)
    trainer.train(resume_from_checkpoint=str(whole.out / "checkpoint-3"))
    assert again.bytes() == whole.bytes() and losses(trainer) == losses(expected)
    saved = qzo.prepare(AutoModelForCausalLM.from_pretrained(whole.out / f"checkpoint-{STEPS}", dtype=torch.float32))
    assert all(torch.equal(saved[name].scales, layer.scales.half().float()) for name, layer in qzo.prepare(whole.model).items())
    assert not torch.equal(*(next(iter(qzo.prepare(m).values())).scales for m in (whole.model, load_model(str(llama4), "cpu", "fp32").model)))


def test_the_best_model_is_loaded_at_the_end(case):
    """With a rate that makes the model worse, the best is the first one saved."""
    keys = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    first, states = case(), {}
    first.zo.param_groups[0]["lr"] = -2.0

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **_):
            states[state.global_step] = first.bytes()

    trainer = first.trainer([Keep()], **keys)
    trainer.train()
    scores = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(scores, key=scores.get)
    assert best != STEPS and first.bytes() == states[best] != states[STEPS]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[best], rel=1e-6)


def test_dropout_and_gradients_are_off_in_a_step(case):
    first = case()
    first.model.train().requires_grad_(True)
    seen = []
    first.model.register_forward_pre_hook(lambda model, _: seen.append((model.training, torch.is_grad_enabled())))
    first.trainer(max_steps=2).train()
    assert seen == [(False, False)] * 4


def test_a_loss_that_is_not_finite_is_shown_as_it_is(case):
    first = case()
    before = first.bytes()
    trainer = first.trainer(max_steps=2)
    trainer.compute_loss = lambda *_, **__: torch.tensor(math.nan)
    trainer.train()
    assert all(math.isnan(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2
    assert first.bytes() == before and first.zo.last.skipped


REFUSED = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True, "neftune_noise_alpha": 5.0, "auto_find_batch_size": True,
           "save_only_model": True}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_step_has_no_use_for_is_refused_by_name(name, case):
    with pytest.raises(BadInput, match=f"TrainingArguments, {name}: {REFUSED[name]}; expected {FIXED[name]}"):
        case().trainer(**{name: REFUSED[name]})


def test_another_optimizer_and_a_checkpoint_without_tuned_tensors_are_refused(case, llama4):
    first = case()
    for wrong in (torch.optim.SGD(first.scales.parameters(), 0.1), None, qzo.ZO([first.scales], stacked=True)):
        with pytest.raises(BadInput, match=f"optimizers: {type(wrong).__name__}; expected \\(a qzo.ZO that is not stacked"):
            ZOTrainer(first.model, first.arguments(), train_dataset=first.rows, optimizers=(wrong, None))
    moved = case("moved")
    moved.zo.device = torch.device("meta")
    with pytest.raises(BadInput, match="optimizers: a ZO on meta; expected cpu.*model.to"):
        moved.trainer()
    with pytest.raises(BadInput, match="no optimizer.pt and scheduler.pt"):
        first.trainer().train(resume_from_checkpoint=str(llama4))


def test_accelerate(case, rows):
    """prepare(optimizer, dataloader) and a plain loop; its state resumes."""
    first, second = case(), case()
    accelerator = Accelerator(cpu=True)
    optimizer, loader = accelerator.prepare(first.zo, DataLoader(rows, batch_size=4))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(first.zo, 1.0, 0.5, total_iters=5))
    manual = torch.optim.lr_scheduler.LinearLR(second.zo, 1.0, 0.5, total_iters=5)
    for step, batch in enumerate(loader):
        optimizer.step(lambda batch=batch: first.model(**batch).loss)
        scheduler.step()
        second.zo.step(lambda batch=batch: second.model(**batch).loss)
        manual.step()
        if step == 2:
            saved = optimizer.state_dict(), first.model.state_dict()
            saved = json.loads(json.dumps(saved[0])), {name: tensor.clone() for name, tensor in saved[1].items()}
    assert first.bytes() == second.bytes() and first.zo.last.loss == second.zo.last.loss
    assert first.zo.param_groups[0]["lr"] == pytest.approx(0.025)
    third = case()
    optimizer = accelerator.prepare(third.zo)
    third.model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    for batch in list(loader)[third.zo.steps :]:
        optimizer.step(lambda batch=batch: third.model(**batch).loss)
        third.zo.param_groups[0]["lr"] = 0.05 * (1 - 0.1 * third.zo.steps)
    assert third.zo.steps == STEPS and third.bytes() == first.bytes()
