"""Charts: numbers in, one `<svg>` as markup out. Lines by step are in line_charts.py.

    forest, forest_axis     a task's difference with its interval, and the scale under all of them
    share_bar               a share as a bar
    source_tokens           what of each source is supervised
    reply_lengths           how long the replies of a model are
    row_lengths             how long the rows of a source are

Colours and line styles are classes of charts.css. Names are escaped here; all else in a chart is a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sftflow.report.figures import number, plural, whole_percent
from sftflow.report.pages import esc


def svg(width: float, height: float, label: str, parts: Iterable[str], kind: str = "") -> Markup:
    """label: what is read out in place of the drawing; without one it is hidden from a screen reader."""
    said = f'role="img" aria-label="{esc(label)}"' if label else 'aria-hidden="true"'
    named = f'class="{kind}" ' if kind else ""
    return Markup(f'<svg {named}viewBox="0 0 {width} {height}" {said}>{"".join(parts)}</svg>')


def text(x: float, y: float, anchor: str, words: str, size: int = 12, kind: str = "") -> str:
    named = f'class="{kind}" ' if kind else ""
    return f'<text {named}x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{esc(words)}</text>'


def _bar(x: float, y: float, width: float, height: float, title: str) -> str:
    """title: what pointing at the bar shows."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f"<rect {box}><title>{title}</title></rect>"


# ---- differences and shares


def forest_scale(intervals: Iterable[Sequence[float]]) -> tuple[float, float]:
    """The forest plot's ends, in quarters: the same for every task, and 0 always inside.

    intervals: what each task's line must hold, its difference and both ends of its interval, where there are such.

    >>> forest_scale([(0.5, 0.25, 0.75), (-0.1, -0.2, 0.0)]), forest_scale([])
    ((-0.25, 0.75), (0.0, 0.25))
    """
    edges = [0.0, *itertools.chain.from_iterable(intervals)]
    low, high = math.floor(min(edges) * 4) / 4, math.ceil(max(edges) * 4) / 4
    return max(low, -1.0), min(max(high, low + 0.25), 1.0)


def _forest_x(x: float, scale: tuple[float, float]) -> float:
    """320 units wide, 20 free at both ends."""
    low, high = scale
    return round(20 + 280 * (min(max(x, low), high) - low) / (high - low), 1)


def _forest_grid(scale: tuple[float, float]) -> list[float]:
    low, high = scale
    step = 0.25 if high - low <= 1 else 0.5
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(delta: float, interval: tuple[float, float], scale: tuple[float, float], outcome: str, label: str) -> Markup:
    """One task's difference and interval. scale: of `forest_scale`.   outcome: "better", "worse" or "unclear"."""
    grid = ((_forest_x(t, scale), "grid" if t else "zero") for t in _forest_grid(scale))
    lines = [f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="20"/>' for x, kind in grid]
    a, b = (_forest_x(x, scale) for x in interval)
    span = f'<path d="M{a} 10H{b}M{a} 6.5V13.5M{b} 6.5V13.5"/>'
    dot = f'<circle cx="{_forest_x(delta, scale)}" cy="10" r="3"/>'
    return svg(320, 20, label, [*lines, f'<g class="ci {esc(outcome)}">{span}{dot}</g>'])


def forest_axis(scale: tuple[float, float]) -> Markup:
    """The numbers under a forest plot, in percent."""
    marks = (
        text(_forest_x(t, scale), 11, "middle", number(100 * t, "+.0f") if t else "0", size=10)
        for t in _forest_grid(scale)
    )
    return svg(320, 14, "", marks)


def share_bar(share: float, label: str) -> Markup:
    """A share in 0..1 of a bar."""
    widths = (("track", 1.0), ("fill", min(max(share, 0.0), 1.0)))
    rects = (f'<rect class="{kind}" width="{200 * part:.1f}" height="12" rx="2"/>' for kind, part in widths)
    return svg(200, 12, label, rects)


def source_tokens(sources: Sequence[Mapping[str, Any]]) -> Markup:
    """The sources of a mixture (as in its ledger): a bar each, as long as its tokens, of which the dark part is
    supervised; and its share of all that is supervised."""
    longest = max((s["tokens"] for s in sources), default=0) or 1
    taught = sum(s["supervised_tokens"] for s in sources) or 1
    left, wide, high, out = 132, 330, 28, [text(132, 12, "start", "tokens: supervised, and read only")]
    out.append(text(718, 12, "end", "of all supervised tokens"))
    for i, s in enumerate(sources):
        y, tokens, own = 22 + high * i, s["tokens"], s["supervised_tokens"]
        name = s["name"] if len(s["name"]) <= 18 else s["name"][:17] + "…"
        out.append(text(left - 8, y + 13, "end", name, kind="of"))
        said = f"{plural(tokens, 'token')}, {own:,} supervised"
        for kind, n in (("track", tokens), ("fill", own)):
            out.append(f'<g class="{kind}">{_bar(left, y, wide * n / longest, 18, said)}</g>')
        end = left + wide * tokens / longest + 8
        out.append(
            text(round(end, 1), y + 13, "start", f"{short(own)} of {short(tokens)}, {whole_percent(own, tokens)}")
        )
        out.append(text(718, y + 13, "end", whole_percent(own, taught), kind="of"))
    return svg(720, 22 + high * len(sources), "Tokens of each source", out, "sources")


# ---- lengths


def reply_lengths(edges: Sequence[float], counts: Sequence[float], tallest: float, after: bool, label: str) -> Markup:
    """How long the replies are: a bar a bin, as high as its share of them.

    Bins are drawn equally wide, whatever their edges, because lengths are told in doubling bins; the last may have no
    upper edge.   tallest: the share that the drawing ends at, the same for both models.   after: the trained model's.
    """
    total, n = sum(counts) or 1, len(counts)
    width, step = 300 / max(n, 1), math.ceil(n / 8)
    out = ['<path class="grid" d="M20 80H320"/>']
    for i, count in enumerate(counts):
        height = round(72 * count / total / (tallest or 1), 1)
        end = f"{edges[i + 1]:,g}" if i + 1 < len(edges) else "more"
        said = f"{edges[i]:,g} to {end} tokens: {count:,g} of {total:,g} replies" if i < len(edges) else f"{count:,g}"
        out.append(_bar(21 + i * width, 80 - height, width - 2, height, said))
    out += [
        text(round(20 + i * width, 1), 96, "middle", f"{edges[i]:,g}", size=11) for i in range(0, len(edges), step or 1)
    ]
    return svg(340, 102, label, out, "lengths after" if after else "lengths")


def row_lengths(edges: Sequence[int], counts: Sequence[int], limit: int | None, name: str) -> Markup:
    """The rows of a source by their tokens, on a logarithmic axis that reaches to `limit`, the longest row that is
    trained on. edges (b + 1,), counts (b,). About as wide as a phone, so that its text is not scaled."""
    width, height, left, right, top, floor = 360, 148, 40, 352, 18, 116
    low, high = float(edges[0]), float(max(edges[-1], limit or 0))
    grid = heights(max(1, *counts))

    def across(tokens: float) -> float:
        return round(left + (right - left) * math.log(tokens / low) / math.log(high / low), 1)

    def up(rows: float) -> float:
        return round(floor - (floor - top) * rows / grid[-1], 1)

    out = []
    for rows in grid:
        out.append(f'<path class="grid" d="M{left} {up(rows)}H{right}"/>')
        out.append(text(left - 5, up(rows) + 4, "end", short(rows), size=11))
    bars = []
    for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True):
        if n:
            tall = max(floor - up(n), 1.0)  # a bar of one row among thousands must still be seen
            said = f"{a:,} to {b - 1:,} tokens: {plural(n, 'row')}"
            bars.append(_bar(across(a) + 0.5, floor - tall, max(across(b) - across(a) - 1, 1), tall, said))
    out.append(f'<g class="bars">{"".join(bars)}</g>')
    last = -1e9
    for tick in (m * 10**d for d in range(8) for m in (1, 2, 5)):
        if low <= tick <= high and across(tick) - last >= 34:
            last = across(tick)
            out.append(f'<path class="grid" d="M{last} {floor}v4"/>')
            out.append(text(last, floor + 15, "middle", short(tick), size=11))
    out.append(text((left + right) / 2, height - 3, "middle", "tokens of a row", size=11))
    out.append(text(left - 5, 9, "end", "rows", size=11))
    if limit and limit >= low:
        at = across(limit)
        out.append(f'<path class="limit" d="M{at} {top - 6}V{floor}"/>')
        side = "end" if at > width / 2 else "start"
        out.append(text(at, 9, side, f"max_length {limit:,}", size=11, kind="limit-name"))
    return svg(width, height, f"{name}: rows by their number of tokens, {edges[0]:,} to {edges[-1]:,}", out)


def heights(most: int) -> list[int]:
    """Round numbers from 0 to the first that is not below `most`, at most five steps apart.

    >>> heights(2), heights(58), heights(7300)
    ([0, 1, 2], [0, 20, 40, 60], [0, 2000, 4000, 6000, 8000])
    """
    step = max(1, round(round_step(most / 4)))
    return list(range(0, most + step, step))[: -(-most // step) + 1]


def round_step(least: float) -> float:
    """The first of 1, 2, 5, 10, 20 ... (and of 0.5, 0.2 ...) that is not below `least`.

    >>> round_step(0.3), round_step(14.5)
    (0.5, 20.0)
    """
    unit = 10.0 ** math.floor(math.log10(least))
    return next(s * unit for s in (1, 2, 5, 10) if s * unit >= least)


def short(n: float) -> str:
    """
    >>> short(512), short(2400), short(13000)
    ('512', '2.4k', '13k')
    """
    return f"{n:g}" if n < 1000 else f"{n / 1000:.3g}k" if n < 1e6 else f"{n / 1e6:.3g}M"
