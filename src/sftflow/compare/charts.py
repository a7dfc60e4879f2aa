"""The report's drawings, each a string of SVG: the forest plot's rows, the share bars, the loss curve.

Colours and line styles are classes of report.css; what is written in a drawing goes through `esc` or is a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from sftflow.chat.inspect_html import esc
from sftflow.compare.words import Data, number, outcome

Points = list[tuple[float, float]]


def scale(tasks: Iterable[Data]) -> tuple[float, float]:
    """The forest plot's ends, in quarters: the same for every task, and 0 always inside."""
    edges = [0.0, *(e for t in tasks for e in (*(t.get("ci95") or ()), t.get("delta") or 0.0))]
    low, high = math.floor(min(edges) * 4) / 4, math.ceil(max(edges) * 4) / 4
    return max(low, -1.0), min(max(high, low + 0.25), 1.0)


def forest(task: Data | None, low: float, high: float, label: str = "") -> str:
    """One task's difference and interval, or (task None) the axis over them. 200 units wide, 12 free at both ends."""

    def at(x: float) -> float:
        return round(12 + 176 * (min(max(x, low), high) - low) / (high - low), 1)

    step = 0.25 if high - low <= 1 else 0.5
    grid = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if task is None:
        marks = "".join(f'<text x="{at(t)}" y="11">{number(100 * t, "+.0f") if t else 0}</text>' for t in grid)
        style = 'font-size="10" text-anchor="middle" aria-hidden="true"'
        return f'<svg viewBox="0 0 200 14" {style}>{marks}</svg>'
    lines = "".join(f'<line class="{"grid" if t else "zero"}" x1="{at(t)}" x2="{at(t)}" y1="0" y2="24"/>' for t in grid)
    if task.get("delta") is None:
        return ""
    span = ""
    if task.get("ci95"):
        a, b = (at(x) for x in task["ci95"])
        span = f'<path d="M{a} 12H{b}M{a} 8V16M{b} 8V16"/>'
    dot = f'<circle cx="{at(task["delta"])}" cy="12" r="3.5"/>'
    return (
        f'<svg viewBox="0 0 200 24" role="img" aria-label="{esc(label)}">{lines}'
        f'<g class="ci {outcome(task)}">{span}{dot}</g></svg>'
    )


def bar(share: float, label: str) -> str:
    rects = "".join(
        f'<rect class="{kind}" width="{200 * min(max(part, 0.0), 1.0):.1f}" height="12" rx="2"/>'
        for kind, part in (("track", 1.0), ("fill", share))
    )
    return f'<svg viewBox="0 0 200 12" role="img" aria-label="{label}">{rects}</svg>'


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` values on both sides:  ([4, 2, 3], 1) -> [4, 3, 2.5]

    Centred, because a trailing mean lags and would draw a falling loss above its own points. It narrows at the steep
    start, and is one-sided at the end, so that the last value is not one noisy step.
    """
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(i - min(reach, i), min(len(values), i + min(reach, i) + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers inside [low, high]:  (0.2, 3.1, 5) -> [1.0, 2.0, 3.0]"""
    raw = max(high - low, 1e-9) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curve(raw: Points, smoothed: Points, val: Points, width: int) -> str:
    """The plot at one width: drawn twice, wide and narrow, because scaled text is unreadable on a phone."""
    height, left, right, top, bottom = 280, 44, 12, 10, 40
    xs, ys = [x for x, _ in raw + val], [y for _, y in raw + val]
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, min(ys)), max(ys)

    def point(x: float, y: float) -> str:
        across = left + (width - left - right) * (x - x0) / ((x1 - x0) or 1)
        return f"{across:.1f} {top + (height - top - bottom) * (1 - (y - y0) / ((y1 - y0) or 1)):.1f}"

    def path(points: Points, kind: str) -> str:
        # At most about two points a pixel: a long run must not make a heavy page.
        thin = points[:: max(1, len(points) // (2 * width))]
        return f'<path class="{kind}" d="M{"L".join(point(x, y) for x, y in thin)}"/>' if thin else ""

    def label(x: float, y: float, shift: tuple[int, int], anchor: str, text: str) -> str:
        px, py = (float(v) for v in point(x, y).split())
        return f'<text x="{px + shift[0]}" y="{py + shift[1]}" font-size="12" text-anchor="{anchor}">{text}</text>'

    axes = "".join(
        f'<path class="grid" d="M{point(x0, y)}L{point(x1, y)}"/>{label(x0, y, (-7, 4), "end", f"{y:g}")}'
        for y in ticks(y0, y1, 5)
    )
    axes += "".join(label(x, y0, (0, 18), "middle", f"{x:,g}") for x in ticks(x0, x1, 4 if width < 500 else 8))
    dots = ""
    for x, y in val:
        px, py = point(x, y).split()
        said = f"step {x:,g}: validation loss {y:.4f}"
        dots += f'<circle class="dot" r="3.5" cx="{px}" cy="{py}"><title>{said}</title></circle>'
    name = f'<text x="{width - right}" y="{height - 4}" font-size="12" text-anchor="end">step</text>'
    return (
        f'<svg class="{"narrow" if width < 500 else "wide"}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Loss by step">{axes}{path(raw, "raw")}{path(smoothed, "smooth")}{path(val, "val")}{dots}{name}'
        "</svg>"
    )
