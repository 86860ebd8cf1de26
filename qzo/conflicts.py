"""Values of a recipe that are right by themselves and do not fit together, and how problems of a recipe read."""

import json
from typing import Any

Problem = tuple[str, str, str]  # key, given, expected


def conflicts(values: dict[str, Any]) -> list[Problem]:
    """Values of a recipe that do not fit together; a value that is missing here is not judged."""
    problems = []
    if values.get("dense"):
        for key in ("dense_lr", "dense_eps"):
            if key in values and values[key] is None:
                problems.append((key, "nothing", "a number, because dense is true"))
    if values.get("clip") is not None and values.get("clip_median") is not None:
        problems.append(("clip", "together with clip_median", "one of the two"))
    # Signs one by one would stream the codes twice in a step.
    if values.get("offload") == "codes" and values.get("stacked") is False:
        dense = values.get("dense")
        fix = "none, because dense is true" if dense else "none, or stacked: true, by which the codes cross the bus once per step"
        problems.append(("offload", "codes with stacked: false", fix))
    if values.get("streaming") and values.get("train_examples", 1) is None:
        problems.append(("train_examples", "null", "a number, because streaming is true"))
    problems += _of_quzo(values)
    for key, bound in (("warmup", "steps"), ("micro_batch", "batch_size")):
        if values.get(key) is not None and bound in values and values[key] > values[bound]:
            problems.append((key, show(values[key]), f"at most {bound}, which is {show(values[bound])}"))
    return problems


def _of_quzo(values: dict[str, Any]) -> list[Problem]:
    """Where integer codes, or adapters under quantized noise, move."""
    if values.get("method", "qzo") == "qzo":
        return []
    problems = []
    for key, plain in (("noise", "rademacher"), ("eps_mode", "relative"), ("dense", False)):
        if values.get(key, plain) != plain:
            problems.append((key, f"{show(values[key])} with method: {values['method']}", show(plain)))
    if values.get("offload") == "codes" and values["method"] == "quzo":
        problems.append(("offload", "codes with method: quzo, which writes them", "none or embeddings"))
    if values.get("activations") == "fp8" and values.get("noise_bits", 4) > 5 and values["method"] == "quzo":
        problems.append(("noise_bits", f"{values['noise_bits']} with activations: fp8", "at most 5, whose levels fp8 holds"))
    return problems


def line(problem: Problem) -> str:
    """`key: given …, expected …`."""
    key, given, expected = problem
    return f"{key}: given {given}, expected {expected}"


def show(value: Any) -> str:
    """A value as JSON, of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 80 else text[:77] + "..."
