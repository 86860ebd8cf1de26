"""loss.png, report.md and report.html of a finished run, from its metrics and its journal's header."""

from pathlib import Path
from typing import Any

import numpy as np

from qzo.disk import disk_error
from qzo.memory import gigabytes
from qzo.metrics import read_metrics
from qzo.report_html import page
from qzo.run import RunFolder

SCORES = ("accuracy", "exact_match", "f1")
OBJECTIVES = {"loss": "loss (nats)", "accuracy": "minus the accuracy", "f1": "minus the F1"}


def results(folder: RunFolder) -> dict[str, Any]:
    """The figures of a run so far: scores before and after, forwards, seconds, peak memory in bytes."""
    lines = read_metrics(folder.metrics)
    evaluations = {m["after"]: m["evaluation"] for m in lines if "evaluation" in m}
    steps = [m for m in lines if "loss" in m]
    last = steps[-1] if steps else {}
    return {
        "before": evaluations.get(0), "after": evaluations.get(max(evaluations, default=0)),
        "steps": len(steps), "forwards": last.get("forwards", 0), "seconds": last.get("seconds", 0.0),
        "peak_memory": max((m.get("peak_memory", 0) for m in lines), default=0), "skipped": sum(m["skipped"] for m in steps),
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """The result as a short Markdown table."""
    rows = [("", "before", "after")]
    for key in (*SCORES, "loss", "perplexity"):
        if key in (figures["after"] or {}):
            rows.append((key.replace("_", " "), *(_shown(figures[when], key) for when in ("before", "after"))))
    rows.append(("peak memory", "", gigabytes(figures["peak_memory"])))
    rows.append(("time", "", f"{figures['seconds']:.0f} s, {figures['steps']} steps"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _shown(scores: dict[str, Any] | None, key: str) -> str:
    if scores is None:  # metrics.jsonl was lost
        return "unknown"
    value = scores[key]
    return "not finite" if value is None else f"{value:.4f}" if key in ("loss", "perplexity") else f"{value:.1%}"


def _plot(folder: RunFolder, path: Path, objective: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder.metrics)
    steps = [m for m in lines if m.get("loss") is not None]
    evaluations = sorted((m["after"], m["evaluation"]) for m in lines if "evaluation" in m)
    x, loss = np.array([m["step"] for m in steps]), np.array([m["loss"] for m in steps])
    width = max(1, len(loss) // 40)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(x, loss, color="0.8", linewidth=0.8, label="training loss")
    if width > 1:
        axis.plot(x[width - 1 :], np.convolve(loss, np.ones(width) / width, "valid"), label=f"mean of {width} steps")
    axis.set_xlabel("step")
    axis.set_ylabel(OBJECTIVES[objective])
    key = next((k for k in SCORES if evaluations and k in evaluations[0][1]), None)
    if key:
        right = axis.twinx()
        right.plot([s for s, _ in evaluations], [e[key] for _, e in evaluations], "o--", color="C1", label=key.replace("_", " "))
        right.set_ylabel(f"validation {key.replace('_', ' ')}")
        right.set_ylim(0, 1)
        right.legend(loc="upper left")
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(
    folder: RunFolder, header: dict[str, Any], command: str, state_sha256: str, phases: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Write loss.png, report.md and report.html; returns `results` with the hash of the tuned tensors. RunFailed on a full disk.

    phases: the estimate, bytes by phase and part.
    """
    figures = {**results(folder), "state_sha256": state_sha256}
    score = next((key for key in SCORES if key in (figures["after"] or {})), None)
    html = page(str(folder.path), header, read_metrics(folder.metrics), figures, command, phases, score)
    try:
        _plot(folder, folder.path / "loss.png", header["recipe"].get("objective", "loss"))
        (folder.path / "report.md").write_text(_text(header, figures, command), encoding="utf-8")
        (folder.path / "report.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise disk_error(folder.path / "loss.png, report.md, report.html", error) from error
    return figures


def _text(header: dict[str, Any], figures: dict[str, Any], command: str) -> str:
    recipe, versions = header["recipe"], header["versions"]
    return f"""# {header["recipe_name"]}, seed {header["seed"]}

{table(figures)}

![loss](loss.png)

- command: `{command}`
- base model: {header["base"]["model"]} (SHA-256 of its weights {header["base"]["sha256"]})
- tuned: {", ".join(f"{len(g['tensors'])} {g['name']} tensors" for g in header["groups"])} (SHA-256 {figures["state_sha256"]})
- example-forwards: {figures["forwards"]}; skipped steps: {figures["skipped"]}
- device: {header["device"]}, {header["dtype"].removeprefix("torch.")}, {header["threads"]} threads
- versions: {", ".join(f"{name} {value}" for name, value in versions.items())}
- noise version {header["noise"]["version"]}, {header["noise"]["distribution"]}: the journal replays bit for bit {header["noise"]["bit_exact"]}

## Recipe

| key | value |
| --- | --- |
""" + "".join(f"| {key} | {value} |\n" for key, value in recipe.items())
