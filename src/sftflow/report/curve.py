"""The loss curve as SVG: training, smoothed, held-out, and held-out per source where these can be told apart.

Line styles are classes of report.css; what is written in the drawing goes through `esc` or is a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftflow.report.token_page import esc

Points = list[tuple[float, float]]
MOST_SOURCES = 6  # lines that can still be told apart


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


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels near those wanted, at least `gap` apart, in the same order, inside [low, high].

    >>> spread([10, 12, 50], 8, 0, 100)
    [10, 18, 50]
    >>> spread([97, 98], 8, 0, 100)
    [92, 100]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for i in range(len(places)):  # down from the top ...
        places[i] = max(places[i], low if i == 0 else places[i - 1] + gap)
    for i in reversed(range(len(places))):  # ... and up again from the foot
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - gap)
    out = list(places)
    for place, i in zip(places, order, strict=True):
        out[i] = place
    return out


def clipped(points: Points, top: float) -> list[Points]:
    """The pieces of a line that lie below `top`, cut where they cross it.

    >>> clipped([(0, 4.0), (2, 2.0), (3, 1.0)], 3.0)
    [[(1.0, 3.0), (2, 2.0), (3, 1.0)]]
    """
    pieces: list[Points] = []
    above = True
    for i, (x, y) in enumerate(points):
        if i and above != (y > top):
            x0, y0 = points[i - 1]
            edge = (x0 + (x - x0) * (top - y0) / (y - y0), top)
            pieces.append([edge]) if above else pieces[-1].append(edge)
        elif i == 0 and y <= top:
            pieces.append([])
        above = y > top
        if not above:
            pieces[-1].append((x, y))
    return pieces


@dataclass(frozen=True)
class Frame:
    """A drawing's window on its data: x0..x1, y0..y1 inside margins, in units of the drawing."""

    width: int
    right: int
    x0: float
    x1: float
    y0: float
    y1: float
    unit: str = "nats per supervised token"
    height: int = 280
    left: int = 34
    top: int = 28
    bottom: int = 40

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / ((self.x1 - self.x0) or 1)
        up = (y - self.y0) / ((self.y1 - self.y0) or 1)
        return (
            round(self.left + (self.width - self.left - self.right) * across, 1),
            round(self.top + (self.height - self.top - self.bottom) * (1 - up), 1),
        )

    def path(self, points: Points, kind: str) -> str:
        # At most about two points a pixel: a long run must not make a heavy page.
        thin = points[:: max(1, len(points) // (2 * self.width))]
        if thin and thin[-1] != points[-1]:
            thin.append(points[-1])
        pieces = ["L".join("{} {}".format(*self.at(x, y)) for x, y in piece) for piece in clipped(thin, self.y1)]
        return f'<path class="{kind}" d="M{"M".join(pieces)}"/>' if pieces else ""

    def axes(self) -> str:
        out = []
        for y in ticks(self.y0, self.y1, 5):
            (a, height), (b, _) = self.at(self.x0, y), self.at(self.x1, y)
            out.append(f'<path class="grid" d="M{a} {height}H{b}"/>')
            out.append(_text(a - 7, height + 4, "end", f"{y:g}"))
        for x in ticks(self.x0, self.x1, 4 if self.width < 500 else 8):
            out.append(_text(self.at(x, self.y0)[0], self.height - self.bottom + 18, "middle", f"{x:,g}"))
        out.append(_text(2, 12, "start", self.unit))
        out.append(_text(self.at(self.x1, self.y0)[0], self.height - 4, "end", "step"))
        return "".join(out)


def _text(x: float, y: float, anchor: str, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x}" y="{y}" font-size="12" text-anchor="{anchor}">{esc(text)}</text>'


def ceiling(raw: Points, held_out: Sequence[Points]) -> tuple[float, float]:
    """(the loss that the drawing ends at, the highest there is).

    What follows the first twentieth of the run fits whole. A base that does not know the format yet begins so much
    higher that all the rest would be a flat line.
    """
    points = [*raw, *itertools.chain(*held_out)]
    steps = [x for x, _ in raw]
    early = min(steps) + (max(steps) - min(steps)) / 20
    highest = max(y for _, y in points)
    late = 1.15 * max((y for x, y in points if x > early), default=highest)
    return (highest if highest < 1.5 * late else late), highest


def curve(raw: Points, smoothed: Points, val: Points, width: int, sources: Mapping[str, Points] | None = None) -> str:
    """The loss at one width: drawn twice, wide and narrow, because scaled text is unreadable on a phone.

    sources: validation per source, thin lines with their names at the end.
    """
    lines = sources or {}
    xs = [x for x, _ in raw + val]
    held_out = [val, *lines.values()]
    floor = min(0.0, min(y for points in (raw, *held_out) for _, y in points))
    letters = 9 if width < 500 else 18
    right = 14 + 7 * min(letters, max(len("all"), *map(len, lines))) if lines else 12
    frame = Frame(width, right, min(xs), max(xs), floor, ceiling(raw, held_out)[0])
    drawn = [frame.axes(), frame.path(raw, "raw")]
    drawn += [frame.path(points, f"source s{i}") for i, points in enumerate(lines.values())]
    drawn += [frame.path(smoothed, "smooth"), frame.path(val, "val")]
    drawn += [_dot(frame, x, y) for x, y in val if y <= frame.y1]
    if lines:
        named = [("all", "val", val)] if val else []
        named += [(name, f"s{i}", points) for i, (name, points) in enumerate(lines.items())]
        drawn.append(_names(frame, named, letters))
    size = f'class="{"narrow" if width < 500 else "wide"}" viewBox="0 0 {width} {frame.height}"'
    return f'<svg {size} role="img" aria-label="Loss by step">{"".join(drawn)}</svg>'


def shares(lines: Mapping[str, Points], width: int) -> str:
    """Shares in 0..1 by step, at most MOST_SOURCES of them, in percent: scores and manners while it trained."""
    kept = {name: [(x, 100 * y) for x, y in points] for name, points in list(lines.items())[:MOST_SOURCES]}
    xs = [x for points in kept.values() for x, _ in points]
    letters = 9 if width < 500 else 18
    right = 14 + 7 * min(letters, max(map(len, kept)))
    frame = Frame(width, right, min(xs), max(xs), 0.0, 100.0, unit="percent of a sample", height=220)
    drawn = [frame.axes(), *(frame.path(points, f"source s{i}") for i, points in enumerate(kept.values()))]
    drawn.append(_names(frame, [(name, f"s{i}", points) for i, (name, points) in enumerate(kept.items())], letters))
    size = f'class="{"narrow" if width < 500 else "wide"}" viewBox="0 0 {width} {frame.height}"'
    return f'<svg {size} role="img" aria-label="Scores by step">{"".join(drawn)}</svg>'


def _dot(frame: Frame, x: float, y: float) -> str:
    px, py = frame.at(x, y)
    said = f"step {x:,g}: validation loss {y:.4f}"
    return f'<circle class="dot" r="3.5" cx="{px}" cy="{py}"><title>{said}</title></circle>'


def _names(frame: Frame, lines: Sequence[tuple[str, str, Points]], letters: int) -> str:
    """Each line's name beside its last point, moved apart where they would cover each other.

    lines: name, class, points.
    """
    ends = [frame.at(*points[-1]) for _, _, points in lines]
    places = spread([y + 4 for _, y in ends], 13, frame.top, frame.height - frame.bottom + 4)
    return "".join(
        _text(
            x + 8, round(place, 1), "start", name if len(name) <= letters else name[: letters - 1] + "…", f"name {kind}"
        )
        for (name, kind, _), (x, _), place in zip(lines, ends, places, strict=True)
    )
