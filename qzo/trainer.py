"""transformers' Trainer around ZO: `ZOTrainer(model=model, args=args, train_dataset=..., optimizers=(zo, None))`.

training_step is a step of ZO on compute_loss. Schedules, logging, evaluation, callbacks, checkpoints and resume are the Trainer's. The
learning rate is that of the targets. A checkpoint is a model folder, and in optimizer.pt the tuned tensors in fp32.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from qzo.errors import BadInput
from qzo.zo.optimizer import ZO

# Arguments of the Trainer that a step without a backward pass has no use for, as they must stand.
FIXED = {
    "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "fp16": False, "bf16": False, "torch_compile": False, "deepspeed": None,
    "neftune_noise_alpha": None, "auto_find_batch_size": False, "save_only_model": False, "world_size": 1, "n_gpu": (0, 1), "fsdp": (None, False, "", []),
}  # fmt: skip


class _Done(torch.optim.Optimizer):
    """What the Trainer's loop steps after training_step, which has done it; its state is ZO's and the tuned tensors."""

    def __init__(self, zo: ZO):
        self.zo = zo
        super().__init__(zo.param_groups, {})
        self.param_groups = zo.param_groups

    def step(self, closure: None = None) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {**self.zo.state_dict(), "tuned": {name: tensor for target in self.zo.targets for name, tensor in target.state().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        tuned = rest.pop("tuned")
        for target in self.zo.targets:
            target.load_state(tuned)
        self.zo.load_state_dict(rest)
        self.param_groups = self.zo.param_groups


class ZOTrainer(Trainer):
    """A Trainer whose optimizer is a ZO over targets of `model` (`qzo.prepare`). Raises BadInput for another one, and for `FIXED`."""

    def __init__(self, *args: Any, optimizers: tuple[ZO, Any], **kwargs: Any):
        self.zo, scheduler = optimizers
        if not isinstance(self.zo, ZO) or self.zo.stacked:
            raise BadInput("ZOTrainer, optimizers", type(self.zo).__name__, "(a qzo.ZO that is not stacked, a scheduler or None)")
        super().__init__(*args, optimizers=(_Done(self.zo), scheduler), **kwargs)
        for name, values in FIXED.items():
            given = getattr(self.args, name, None)
            if given not in (values if isinstance(values, tuple) else (values,)):
                raise BadInput(f"TrainingArguments, {name}", str(given), f"{values}: a step here has no backward pass and runs in one process")
        if (now := self.zo.targets[0].parameters()[0].device) != self.zo.device:
            raise BadInput("ZOTrainer, optimizers", f"a ZO on {self.zo.device}", str(now), "Make it when the model is there: model.to(...) first.")
        self.args.logging_nan_inf_filter = False  # it would show the mean of earlier steps for a loss that is not finite

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        model.eval()
        inputs = self._prepare_inputs(inputs)
        return self.zo.step(lambda: self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """There is none; `log` shows |d|, the projected gradient, instead."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        shown = {"abs_d": float(np.abs(self.zo.last.projected).mean())} if "loss" in logs else {}
        super().log({**logs, **shown}, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not all((Path(resume_from_checkpoint) / name).is_file() for name in ("optimizer.pt", "scheduler.pt")):
            raise BadInput(resume_from_checkpoint, "no optimizer.pt and scheduler.pt", "a checkpoint of ZOTrainer: the tuned tensors are in it")

    def _load_best_model(self) -> None:
        self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)
