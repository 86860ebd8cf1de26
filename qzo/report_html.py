"""report.html: a run on one page that needs no other file and no network; it reads well on a phone and in the dark."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from qzo.charts import Points, Series, bar_chart, line_chart, moving_mean
from qzo.zo.estimator import Clip

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2430; --quiet: #5c6675; --rule: #dde1e7;
  --main: #1a5fb4; --second: #b8500a; --faint: #a9b4c2; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1b2027; --text: #e4e8ee; --quiet: #9aa5b3; --rule: #343c47;
  --main: #78b4f5; --second: #f0a05a; --faint: #5d6a7a; } }
@media (max-width: 480px) { body { padding: 8px !important; } figure, .scroll { padding: 8px !important; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 8px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 28px 0 8px; }
.quiet, .legend { color: var(--quiet); margin: 0; }
.tiles, .charts { display: grid; gap: 12px; margin-top: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tile, figure, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; margin: 0; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tile small { color: var(--quiet); }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 14px; fill: var(--quiet); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.note { margin-top: 8px; }
.grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.faint { stroke: var(--faint); stroke-width: 1; } polyline.main { stroke: var(--main); }
polyline.second { stroke: var(--second); stroke-dasharray: 6 4; }
circle.main { fill: var(--main); } circle.second { fill: var(--second); }
.bar { fill: var(--main); } .mark { stroke: var(--second); stroke-width: 2; stroke-dasharray: 6 4; }
.legend { font-size: .85rem; } .key { margin-right: 10px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 4px; margin: 0 5px 3px 0; border-radius: 2px; background: var(--faint); }
.key.main::before { background: var(--main); } .key.second::before { background: var(--second); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
td { overflow-wrap: anywhere; } th { font-weight: 600; white-space: nowrap; }
.numbers th { white-space: normal; }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { margin: 4px 0 10px; padding: 8px 10px; overflow-x: auto; border-radius: 6px; background: var(--page); font-size: .85rem; }
"""


def page(
    run: str, header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], command: str,
    phases: Mapping[str, Mapping[str, int]], score: str | None,
) -> str:  # fmt: skip
    """The page of a run in the folder `run`, from its metrics; phases: bytes by phase and part; score: what accuracy is called here."""
    title = f"{header['recipe_name']}, seed {header['seed']}"
    recipe = "".join(_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in header["recipe"].items())
    body = [
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(header["base"]["model"])} on {escape(header["device"])}</p>',
        _tiles(figures, score),
        f'<h2>Curves</h2><div class="charts">{"".join(_curves(header["recipe"], lines, score))}</div>',
        "<h2>Memory</h2>", _memory(lines, figures, phases, header["device"]),
        f'<h2>The run</h2><div class="scroll"><table>{_facts(header, lines, figures)}</table></div>',
        f'<h2>To go on</h2><div class="scroll">{_commands(run, command)}</div>',
        f'<h2>Settings</h2><div class="scroll"><table>{recipe}</table></div>',
    ]  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _row(name: str, value: Any) -> str:
    return f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"


def _size(size: float, largest: float) -> str:
    return f"{size / 1e9:.2f} GB" if largest >= 1e9 else f"{size / 1e6:.1f} MB"


def _shown(scores: Mapping[str, Any] | None, key: str) -> str:
    value = (scores or {}).get(key)
    return "unknown" if value is None else f"{value:.4f}" if key in ("loss", "perplexity") else f"{value:.1%}"


def _tiles(figures: Mapping[str, Any], score: str | None) -> str:
    found = [
        (f"{_shown(figures['before'], key)} → {_shown(figures['after'], key)}", f"validation {key.replace('_', ' ')}, before → after")
        for key in (*([score] if score else []), "loss", "perplexity")
        if key != "perplexity" or key in (figures["after"] or {})
    ]
    peak = figures["peak_memory"]
    found += [(_size(peak, peak), "peak memory"), (f"{figures['seconds']:.0f} s", f"{figures['steps']} steps, {figures['forwards']} example-forwards")]
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(a)}</b><small>{escape(b)}</small></div>' for a, b in found) + "</div>"


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _curves(recipe: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], score: str | None) -> list[str]:
    steps = [line for line in lines if "step" in line]
    evaluations = sorted((line["after"], line["evaluation"]) for line in lines if "evaluation" in line)
    loss, size = _points(steps, "loss"), _points(steps, "abs_d")
    width = max(1, len(loss) // 40)
    curves = [Series("each step", "faint" if width > 1 else "main", loss)]
    if width > 1:
        curves.append(Series(f"mean of {width} steps", "main", moving_mean(loss, width)))
    validation = [(after, scores["loss"]) for after, scores in evaluations if scores.get("loss") is not None]
    curves.append(Series("validation", "second", validation, dots=True))
    drawn = [line_chart("Loss", "step", "nats", curves)]
    if score:
        points = [(after, scores[score]) for after, scores in evaluations if scores.get(score) is not None]
        name = score.replace("_", " ")
        drawn.append(line_chart(f"Validation {name}", "step", "share of the examples", [Series(name, "main", points, True)], False, (0, 1), True))
    points = [(after, scores["perplexity"]) for after, scores in evaluations if scores.get("perplexity") is not None]
    if points:
        drawn.append(line_chart("Validation perplexity", "step", "lower is better", [Series("perplexity", "main", points, True)]))
    clipped = _points([line for line in steps if line["clipped"]], "abs_d")
    bounds = [Series("|d|", "main" if len(size) < 200 else "faint", size)]
    bounds.append(Series("clip", "second", _clip(recipe, size)))
    bounds.append(Series(f"clipped ({len(clipped)} steps)", "second", clipped, dots=True, line=False))
    drawn.append(line_chart("Projected gradient |d|", "step", "logarithmic", bounds, log=True))
    drawn.append(line_chart("Learning rate", "step", "of the first group", [Series("lr", "main", _points(steps, "lr"))]))
    return drawn


def _clip(recipe: Mapping[str, Any], size: Points) -> list[tuple[float, float]]:
    """The bound on |d| by step. Of several directions only the mean |d| is known here, and no median."""
    if recipe["clip"] is not None:
        return [(step, recipe["clip"]) for step, _ in size[:1] + size[-1:]]
    if recipe["clip_median"] is None or recipe["directions"] > 1:
        return []
    recent = [[value for _, value in size[max(0, i - Clip.WINDOW) : i]] for i in range(len(size))]
    return [(step, recipe["clip_median"] * median(known)) for (step, _), known in zip(size, recent, strict=True) if len(known) >= Clip.WARMUP]


def _memory(lines: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], phases: Mapping[str, Mapping[str, int]], device: str) -> str:
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    peak, largest = figures["peak_memory"], max(totals.values())
    bars = [(phase, total, _size(total, largest)) for phase, total in totals.items()]
    chart = bar_chart("Estimate by phase, and the measured peak", bars, (peak, f"measured {_size(peak, peak)}"))
    # Of the estimate alone: on a CPU the measured peak is mostly Python's.
    unit, scale, digits = ("GB", 1e9, 2) if largest >= 1e9 else ("MB", 1e6, 1)

    def cells(sizes: Iterable[int]) -> str:
        return "".join(f"<td>{size / scale:.{digits}f}</td>" for size in sizes)

    names = dict.fromkeys(part for parts in phases.values() for part, size in parts.items() if size)
    rows = [f"<tr><th>{escape(n)}</th>{cells(parts.get(n, 0) for parts in phases.values())}</tr>" for n in names]
    rows.append(f"<tr><th>together</th>{cells(totals.values())}</tr>")
    heads = "".join(f"<th>{escape(phase)}</th>" for phase in phases)
    seen = [(line["after"], line["peak_memory"]) for line in lines if "evaluation" in line]
    reached = "; ".join(f"{_size(most, peak)} after the evaluation at step {after}" for after, most in (seen[:1] + seen[-1:] if seen[1:] else seen))
    host = " On a CPU it is all that the process ever held, Python and its libraries too, which the estimate leaves out." if "CPU" in device else ""
    return (
        f'<div class="charts">{chart}<div class="scroll numbers"><table><thead><tr><th>estimate, {unit}</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div></div><p class="quiet note">Measured: {escape(reached or "nothing")}.{host}</p>'
    )


def _facts(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> str:
    clipped = sum(bool(line.get("clipped")) for line in lines)
    tokens = max((line.get("tokens", 0) for line in lines), default=0)
    rate = f", {tokens / figures['seconds']:.0f} per second with evaluations" if figures["seconds"] else ""
    noise = header["noise"]
    return "".join(_row(name, value) for name, value in {
        "steps": figures["steps"], "skipped": figures["skipped"], "clipped": clipped, "tokens": f"{tokens}{rate}",
        "tuned": ", ".join(f"{len(group['tensors'])} {group['name']} tensors" for group in header["groups"]),
        "SHA-256 of the tuned state": figures["state_sha256"], "SHA-256 of the base": header["base"]["sha256"],
        "SHA-256 of the examples": header["data_sha256"],
        "device": f"{header['device']}, {header['dtype'].removeprefix('torch.')}, threads {header['threads']}, {header['micro_batch']} examples at a time",
        "versions": ", ".join(f"{name} {value}" for name, value in header["versions"].items()),
        "noise": f"version {noise['version']}, {noise['distribution']}: the journal replays bit for bit {noise['bit_exact']}",
    }.items())  # fmt: skip


def _commands(run: str, command: str) -> str:
    folder = shlex.quote(run)
    found = {
        "Continue the run, or make it again elsewhere": command, "Write the tuned model as an ordinary checkpoint": f"qzo export {folder} -o MODEL",
        "Score it again": f"qzo evaluate {folder}", "Rebuild the tuned tensors from the journal and compare": f"qzo replay {folder} --verify",
    }  # fmt: skip
    return "".join(f"<div>{escape(name)}</div><pre>{escape(text)}</pre>" for name, text in found.items())
