"""What bench_kernels must show, and its plot: functions of the rows it measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = [
    "op", "model", "layer", "N", "K", "M", "bits", "group", "sym", "noise", "variants", "route", "us", "us_p20", "us_p80", "tflops", "gbs",
    "roofline", "vs_cublas", "vs_off", "vs_halves", "rel_error", "target", "met", "reason",
]  # fmt: skip
NOISY_VS_CUBLAS = {4096: 1.05, 1024: 1.25, 256: 1.5, 64: 1.0, 16: 0.6, 1: 0.5}
ON_VS_OFF = 1.03
ERROR = 3e-3
LOW_BIT_VS_CUBLAS = {"int8": 0.95, "fp8": 0.75}


def halves_target(m: int) -> float | None:
    """Variants in one launch against two launches of half the rows; None where the best route is only reported."""
    return 0.85 if m <= 64 else 1.0 if m <= 256 else None


def speed(row: Row, seconds: float, moved: float, operations: float, unit: str, ceilings: dict[str, float | None]) -> Row:
    """Rates, and the share of the roofline: the time that `moved` bytes at the copy's bandwidth or the operations at the peak of
    their unit must take (the larger), over the measured time."""
    peak = ceilings.get(unit)
    bounds = [moved / ceilings["bytes"]] + ([operations / peak] if peak else [])
    share = max(bounds) / seconds if peak or not operations else None
    rates = {"tflops": operations / seconds / 1e12 if operations else None, "gbs": moved / seconds / 1e9, "roofline": share}
    return row | {"us": seconds * 1e6} | rates


def _beside(row: Row, rows: Sequence[Row], **like: Any) -> float | None:
    """us of the row that differs from `row` in `like` alone."""
    keys = ("op", "model", "layer", "M", "bits", "noise", "variants", "route")
    wanted = {key: row.get(key) for key in keys} | like
    found = [other["us"] for other in rows if other.get("us") and all(other.get(k) == v for k, v in wanted.items())]
    return found[0] if found else None


def ratios(row: Row, rows: Sequence[Row]) -> Row:
    """`row` with its ratios to the other rows of the same layer and M."""
    if not row.get("us"):
        return row
    plain = {"bits": None, "noise": None, "variants": None}
    against = {"vs_cublas": _beside(row, rows, op="cublas", route="bf16", **plain) if row["M"] else None}
    if row.get("noise") and row.get("variants") == 1:
        against["vs_off"] = _beside(row, rows, noise=False)
    if row["op"] == "quant_matmul" and (row.get("variants") or 1) > 1:
        against["vs_halves"] = _beside(row, rows, op="two_halves", variants=1, route="auto")
    return row | {key: row["us"] / us if us else None for key, us in against.items()}


def targets(row: Row) -> dict[str, float]:
    """Column -> the most it may be, for one row."""
    op, m = row["op"], row["M"]
    found = {}
    if op == "quant_matmul" and row["route"] == "auto":
        if row["bits"] == 4 and row["variants"] == 1 and row["noise"] and row["model"] == "13b" and m in NOISY_VS_CUBLAS:
            found["vs_cublas"] = NOISY_VS_CUBLAS[m]
        if row["noise"] and row["variants"] == 1:
            found["vs_off"] = ON_VS_OFF
        if row["variants"] > 1 and halves_target(m) is not None:
            found["vs_halves"] = halves_target(m)
    if op in ("w4a8", "w8a8") and m >= 1024:
        found["vs_cublas"] = LOW_BIT_VS_CUBLAS[row["route"]]
    if op in ("quant_matmul", "two_halves", "w4a8", "w8a8", "dequantize"):
        found["rel_error"] = ERROR
    return found


def judged(row: Row) -> Row:
    """`row` with its targets and whether all of them are met."""
    asked = targets(row)
    if not asked:
        return row
    met = all(row.get(column) is not None and row[column] <= most for column, most in asked.items())
    return row | {"target": "; ".join(f"{column} <= {most:g}" for column, most in asked.items()), "met": "yes" if met else "no"}


def must_show(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The table of targets and its columns: a line per target and layer, a column per M, `value ok` or `value > target`."""
    sizes = sorted({row["M"] for row in rows if row["M"]})
    lines: dict[tuple, Row] = {}
    for row in rows:
        for column, most in targets(row).items():
            if column == "rel_error" or not row["M"]:
                continue
            name = f"{row['op']} {row['route']} W{row['bits']}, variants {row['variants']}"
            named = {"what": name, "ratio": column, "layer": f"{row['model']} {row['layer']}"}
            line = lines.setdefault((name, column, row["model"], row["layer"]), named)
            line[f"M={row['M']}"] = _verdict(row.get(column), most)
    for model, layer, m, variants, name, value in _best_routes(rows):
        line = lines.setdefault((name, model, layer), {"what": name, "ratio": "vs_halves", "layer": f"{model} {layer}"})
        line[f"M={m}"] = value
    errors = [(row["rel_error"], row["op"], row["M"]) for row in rows if "rel_error" in targets(row) and row.get("rel_error") is not None]
    if errors:
        worst = max(errors)
        lines[("error",)] = {"what": "largest relative error", "ratio": f"{worst[1]} M={worst[2]}", "layer": _verdict(worst[0], ERROR)}
    return list(lines.values()), ["what", "ratio", "layer", *(f"M={m}" for m in sizes)]


def _verdict(value: float | None, most: float) -> str:
    if value is None:
        return "did not run"
    return f"{value:.3g} ok" if value <= most else f"{value:.3g} > {most:g}"


def _best_routes(rows: Sequence[Row]):
    """(model, layer, M, V, name, text) of the fastest route where no ratio is asked for."""
    measured = [row for row in rows if row["op"] == "quant_matmul" and row.get("vs_halves") and halves_target(row["M"]) is None]
    for model, layer, m, variants in dict.fromkeys((r["model"], r["layer"], r["M"], r["variants"]) for r in measured):
        same = [r for r in measured if (r["model"], r["layer"], r["M"], r["variants"]) == (model, layer, m, variants)]
        best = min(same, key=lambda r: r["vs_halves"])
        yield model, layer, m, variants, f"best route, variants {variants}", f"{best['vs_halves']:.3g} {best['route']}"


SERIES = [  # op, bits, noise, variants, route, label
    ("quant_matmul", 4, True, 1, "auto", "int4, noise"), ("quant_matmul", 4, True, 1, "fused", "int4, noise, fused"),
    ("quant_matmul", 4, True, 1, "dequantize", "int4, noise, dequantize"), ("quant_matmul", 4, True, 2, "auto", "int4, ± stacked"),
    ("quant_matmul", 4, True, 16, "auto", "int4, 16 directions"), ("w4a8", 4, True, 1, "int8", "W4A8 int8"),
    ("w8a8", 8, True, 1, "int8", "W8A8 int8"), ("w4a8", 4, True, 1, "fp8", "W4A8 fp8"), ("w8a8", 8, True, 1, "fp8", "W8A8 fp8"),
    ("torch int_mm", 8, None, None, "int8", "torch int8, no scales"), ("torch int4pack_mm", 4, False, 1, "", "torch int4"),
    ("gemlite", 4, False, 1, "", "gemlite"),
]  # fmt: skip


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Time over that of cuBLAS bf16 against M, a panel for each layer; short black lines are the targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    layers = list(dict.fromkeys((row["model"], row["layer"], row["N"], row["K"]) for row in rows if row.get("vs_cublas")))
    sizes = sorted({row["M"] for row in rows if row["M"]})
    figure, axes = pyplot.subplots(1, max(1, len(layers)), figsize=(6 * max(1, len(layers)), 5), sharey=True, squeeze=False)
    for axis, (model, layer, n, k) in zip(axes[0], layers, strict=False):
        for index, (op, bits, noise, variants, route, label) in enumerate(SERIES):
            wanted = {"op": op, "bits": bits, "noise": noise, "variants": variants, "route": route, "model": model, "layer": layer}
            points = sorted((r["M"], r["vs_cublas"]) for r in rows if r.get("vs_cublas") and all(r.get(a) == b for a, b in wanted.items()))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{index % 10}", ls="-" if index < 10 else ":", label=label, ms=3, lw=1)
        if model == "13b":
            for m, most in NOISY_VS_CUBLAS.items():
                axis.plot([m / 1.4, m * 1.4], [most, most], color="black", lw=2)
        axis.axhline(1, color="grey", lw=0.5)
        axis.set(yscale="log", xlabel="rows M", title=f"{model} {layer}, {n}×{k}")
        axis.set_xscale("log")
        for ticks, values in ((axis.xaxis, sizes), (axis.yaxis, (0.5, 0.6, 0.75, 1, 1.25, 1.5, 2, 3, 4))):
            ticks.set_major_locator(ticker.FixedLocator(values))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_locator(ticker.NullLocator())
    axes[0][0].set_ylabel("time / cuBLAS bf16")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
