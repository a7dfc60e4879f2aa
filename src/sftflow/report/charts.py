"""The report's drawings, each a string of SVG: the forest plot's rows, the share bars, the lengths of replies.

Colours and line styles are classes of report.css; what is written in a drawing goes through `esc` or is a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sftflow.report.token_page import esc
from sftflow.report.wording import Data, number, outcome


def scale(tasks: Iterable[Data]) -> tuple[float, float]:
    """The forest plot's ends, in quarters: the same for every task, and 0 always inside."""
    edges = [0.0, *(e for t in tasks for e in (*(t.get("ci95") or ()), t.get("delta") or 0.0))]
    low, high = math.floor(min(edges) * 4) / 4, math.ceil(max(edges) * 4) / 4
    return max(low, -1.0), min(max(high, low + 0.25), 1.0)


def forest(task: Data | None, low: float, high: float, label: str = "") -> str:
    """One task's difference and interval, or (task None) the axis under them. 320 units wide, 20 free at both ends."""

    def at(x: float) -> float:
        return round(20 + 280 * (min(max(x, low), high) - low) / (high - low), 1)

    step = 0.25 if high - low <= 1 else 0.5
    grid = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if task is None:
        marks = "".join(f'<text x="{at(t)}" y="11">{number(100 * t, "+.0f") if t else 0}</text>' for t in grid)
        style = 'font-size="10" text-anchor="middle" aria-hidden="true"'
        return f'<svg viewBox="0 0 320 14" {style}>{marks}</svg>'
    lines = "".join(f'<line class="{"grid" if t else "zero"}" x1="{at(t)}" x2="{at(t)}" y1="0" y2="20"/>' for t in grid)
    if task.get("delta") is None:
        return ""
    span = ""
    if task.get("ci95"):
        a, b = (at(x) for x in task["ci95"])
        span = f'<path d="M{a} 10H{b}M{a} 6.5V13.5M{b} 6.5V13.5"/>'
    dot = f'<circle cx="{at(task["delta"])}" cy="10" r="3"/>'
    return (
        f'<svg viewBox="0 0 320 20" role="img" aria-label="{esc(label)}">{lines}'
        f'<g class="ci {outcome(task)}">{span}{dot}</g></svg>'
    )


def bar(share: float, label: str) -> str:
    rects = "".join(
        f'<rect class="{kind}" width="{200 * min(max(part, 0.0), 1.0):.1f}" height="12" rx="2"/>'
        for kind, part in (("track", 1.0), ("fill", share))
    )
    return f'<svg viewBox="0 0 200 12" role="img" aria-label="{label}">{rects}</svg>'


def lengths(edges: Sequence[float], counts: Sequence[float], tallest: float, after: bool, label: str) -> str:
    """How long the replies are: a bar a bin, as high as its share of them.

    Bins are drawn equally wide, whatever their edges, because lengths are told in doubling bins. tallest: the share
    that the drawing ends at, the same for both models.
    """
    total, n = sum(counts) or 1, len(counts)
    width, step = 300 / max(n, 1), math.ceil(n / 8)
    out = []
    for i, count in enumerate(counts):
        high = round(72 * count / total / (tallest or 1), 1)
        end = f"{edges[i + 1]:,g}" if i + 1 < len(edges) else "more"
        said = f"{edges[i]:,g} to {end} tokens: {count:,g} of {total:,g} replies" if i < len(edges) else f"{count:,g}"
        x = 20 + i * width
        out.append(f'<rect x="{x + 1:.1f}" y="{80 - high:.1f}" width="{width - 2:.1f}" height="{high}"><title>{said}')
        out.append("</title></rect>")
    marks = [(i, edge) for i, edge in enumerate(edges) if i % step == 0]
    out += [_text(round(20 + i * width, 1), 96, "middle", f"{edge:,g}") for i, edge in marks]
    style = f'class="lengths{" after" if after else ""}" viewBox="0 0 340 102"'
    axis = '<path class="grid" d="M20 80H320"/>'
    return f'<svg {style} role="img" aria-label="{esc(label)}">{axis}{"".join(out)}</svg>'


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="11" text-anchor="{anchor}">{esc(text)}</text>'
