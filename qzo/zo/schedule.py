"""Learning-rate schedules: pure functions of the step, so that a resumed run continues on the same curve."""

import math


def schedule(kind: str, lr: float, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate of `step` (counted from 0) in a run of `steps`.

    During warm-up (step < warmup): lr * (step + 1) / warmup. After it, with t = (step - warmup) / (steps - warmup):
    constant lr, linear lr * (1 - t), cosine lr * (1 + cos(pi t)) / 2.
    Raises ValueError for another kind, or a step outside 0 .. steps - 1.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step: given {step}, expected 0 .. {steps - 1}")
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule: given {kind!r}, expected constant, linear or cosine")
    if step < warmup:
        return lr * (step + 1) / warmup
    if kind == "linear":
        return lr * (steps - step) / (steps - warmup)
    if kind == "cosine":
        return lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return lr
