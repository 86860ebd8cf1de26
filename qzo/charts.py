"""Line and bar charts as inline SVG; colors are the CSS variables of the page around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 270  # small, so that 14 px text can still be read on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 42
MOST = 700  # points of a curve; of more, the least and the greatest of each stretch

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """label: for the legend. kind: a class of the page's style. dots: marks, besides or (`line` false) instead of the line."""

    label: str
    kind: str
    points: Points
    dots: bool = False
    line: bool = True


def thin(points: Points, most: int = MOST) -> Points:
    """At most about `most` points, with every spike kept."""
    if len(points) <= most:
        return points
    width, kept = math.ceil(2 * len(points) / most), []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` or before to `high` or beyond."""
    raw = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil(max(last - first, 1) / 6)
    return [10.0**e for e in range(first, max(last, first + 1) + every, every)]


def _number(value: float) -> str:
    return f"{value:.6g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"


def line_chart(
    title: str, x_name: str, y_name: str, series: Sequence[Series], log: bool = False, bounds: tuple[float, float] | None = None,
    percent: bool = False,
) -> str:  # fmt: skip
    """A figure with its legend; log: the y axis, without the values that are not positive. bounds: of y, else those of the data."""
    series = [Series(s.label, s.kind, [p for p in s.points if not log or p[1] > 0], s.dots, s.line) for s in series]
    series = [s for s in series if s.points]
    head = f"<figure><figcaption>{escape(title)}</figcaption>"
    if not series:
        return head + '<p class="quiet">nothing was recorded</p></figure>'
    xs, ys = ([p[i] for s in series for p in s.points] for i in (0, 1))
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = _decades(min(ys), max(ys)) if log else ticks(*(bounds or (min(ys), max(ys))))

    def across(x: float) -> float:
        low, high = min(xs), max(max(xs), min(xs) + 1)
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        low, high, y = (math.log10(v) for v in (y_ticks[0], y_ticks[-1], y)) if log else (y_ticks[0], y_ticks[-1], y)
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{up(y) + 5:.1f}">{f"{y:.0%}" if percent else _number(y)}</text>')
    for x in x_ticks:
        if LEFT - 1 <= across(x) <= WIDTH - RIGHT + 1:
            parts.append(f'<text class="mid" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}">{_number(x)}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}">{escape(x_name)}</text>')
    for s in series:
        drawn = [(across(x), up(y)) for x, y in thin(s.points)]
        if s.line:
            parts.append(f'<polyline class="{s.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>')
        if s.dots:
            parts += [f'<circle class="{s.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{4 if s.line else 2.5}"/>' for x, y in drawn]
    legend = " ".join(f'<span class="key {s.kind}">{escape(s.label)}</span>' for s in series)
    return f'{head}{"".join(parts)}</svg><p class="legend">{escape(y_name)}: {legend}</p></figure>'


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]], mark: tuple[float, str]) -> str:
    """Bars (name, size, text) and one line across them all (size, text) in the same unit."""
    top, row = max([mark[0], *(size for _, size, _ in bars)]) or 1.0, 30
    left, room, height = 92, WIDTH - 92 - 76, len(bars) * row + 24
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for i, (name, size, text) in enumerate(bars):
        y = i * row + 5
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 15}">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y}" width="{size / top * room:.1f}" height="20"/>')
        parts.append(f'<text x="{left + size / top * room + 6:.1f}" y="{y + 15}">{escape(text)}</text>')
    x = left + mark[0] / top * room
    parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
    parts.append(f'<text class="end" x="{WIDTH - 4}" y="{height - 4}">{escape(mark[1])}</text>')
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def moving_mean(points: Points, width: int) -> list[tuple[float, float]]:
    """Each point with the mean of the last `width` values; none before there are as many."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = [(after - before) / width for before, after in zip(sums, sums[width:], strict=False)]
    return [(x, mean) for (x, _), mean in zip(points[width - 1 :], means, strict=True)]
