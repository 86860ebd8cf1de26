"""Values of a recipe that are right by themselves and do not fit together, and how problems of a recipe read."""

import json
from typing import Any

Problem = tuple[str, str, str]  # key, given, expected
QUANTIZER = ("clipping", "step", "zero", "span", "scale", "shift")


def conflicts(values: dict[str, Any]) -> list[Problem]:
    """Values of a recipe that do not fit together; a value that is missing here is not judged."""
    problems = []
    if values.get("dense"):
        for key in ("dense_lr", "dense_eps"):
            if key in values and values[key] is None:
                problems.append((key, "nothing", "a number, because dense is true"))
    if values.get("clip") is not None and values.get("clip_median") is not None:
        problems.append(("clip", "together with clip_median", "one of the two"))
    # Signs one by one would stream them twice in a step.
    if (streamed := values.get("offload")) in ("codes", "latents") and values.get("stacked") is False:
        never = "dense is true" if values.get("dense") else "a quantizer moves" if values.get("quantizer") else None
        crossing = "once per step" if streamed == "codes" else "once per step, and once back"
        fix = f"none, because {never}" if never else f"none, or stacked: true, by which the {streamed} cross the bus {crossing}"
        problems.append(("offload", f"{streamed} with stacked: false", fix))
    if values.get("streaming") and values.get("train_examples", 1) is None:
        problems.append(("train_examples", "null", "a number, because streaming is true"))
    problems += _of_quzo(values) + _of_zeroqat(values)
    for key, bound in (("warmup", "steps"), ("micro_batch", "batch_size")):
        if values.get(key) is not None and bound in values and values[key] > values[bound]:
            problems.append((key, show(values[key]), f"at most {bound}, which is {show(values[bound])}"))
    return problems


def _of_quzo(values: dict[str, Any]) -> list[Problem]:
    """Where integer codes, or adapters under quantized noise, move."""
    if values.get("method") not in ("quzo", "quzo-lora"):
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


def _of_zeroqat(values: dict[str, Any]) -> list[Problem]:
    """Where latent weights and their quantizer move; and that nowhere else they do."""
    method, mode = values.get("method", "qzo"), values.get("eps_mode")
    if method != "zeroqat":
        plain = (("latent_layers", None), ("direction", "latent"), ("quantizer", []))
        problems = [(key, f"{show(values[key])} with method: {method}", f"{show(value)}; it is of zeroqat") for key, value in plain
                    if key in values and values[key] != value]  # fmt: skip
        if values.get("offload") == "latents":
            problems.append(("offload", f"latents with method: {method}", "none, embeddings or codes; it is of zeroqat"))
        return problems + ([("eps_mode", f"relative_step with method: {method}", "relative or absolute")] if mode == "relative_step" else [])
    problems = [
        (key, f"{show(values[key])} with method: zeroqat", expected)
        for key, given, expected in (
            ("eps_mode", "relative", "relative_step, in steps of the grid, or absolute"), ("dense", True, "false"),
            ("offload", "codes", "none, embeddings or latents"), ("activations", "int8", "null: the checkpoint says how many bits"),
            ("activations", "fp8", "null: the checkpoint says how many bits"),
        )
        if values.get(key) == given
    ]  # fmt: skip
    parts, layers = values.get("quantizer") or [], values.get("latent_layers")
    if layers == [] and values.get("offload") == "latents":
        problems.append(("offload", "latents with latent_layers: []", "none or embeddings: no weight moves"))
    if layers == [] and "quantizer" in values and not parts:
        problems.append(("latent_layers", "[] without quantizer", "null or names of layers, or parts of the quantizer: nothing would move"))
    if "quantizer" in values and not parts and values.get("quantizer_lr") is not None:
        problems.append(("quantizer_lr", f"{values['quantizer_lr']} without quantizer", "null, or parts of the quantizer: none moves"))
    if values.get("direction") == "realized":
        for key, fits, expected in (("eps_mode", mode in (None, "relative_step"), "relative_step"), ("quantizer", not parts, "[]"),
                                    ("directions", values.get("directions", 1) == 1, "1"), ("latent_layers", layers != [], "layers")):  # fmt: skip
            if not fits:
                problems.append((key, f"{show(values[key])} with direction: realized", expected))
    return problems + (_of_parts(values, parts, layers) if parts else [])


def _of_parts(values: dict[str, Any], parts: list[str], layers: list[str] | None) -> list[Problem]:
    """Where parts of the quantizer move."""
    problems = []
    if unknown := [part for part in parts if part not in QUANTIZER]:
        problems.append(("quantizer", show(unknown[0]), f"some of {', '.join(QUANTIZER)}"))
    if "quantizer_lr" in values and values["quantizer_lr"] is None:
        problems.append(("quantizer_lr", "nothing", "a number, because a quantizer moves"))
    if values.get("stacked"):
        problems.append(("stacked", "true with a quantizer that moves", "false"))
    if layers:
        problems.append(("latent_layers", f"{show(layers)} with a quantizer that moves", "null or []: packed layers have none"))
    # A zero point is rounded: of less than half a step nothing is seen.
    if "zero" in parts and values.get("noise") == "rademacher" and values.get("quantizer_eps", 1.0) <= 0.5:
        problems.append(("quantizer_eps", f"{values['quantizer_eps']} with quantizer: zero", "above 0.5: zero points are whole grid steps"))
    return problems


def line(problem: Problem) -> str:
    """`key: given …, expected …`."""
    key, given, expected = problem
    return f"{key}: given {given}, expected {expected}"


def show(value: Any) -> str:
    """A value as JSON, of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 80 else text[:77] + "..."
