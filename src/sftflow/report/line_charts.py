"""Charts of lines by step: the loss of training, and scores while it trained.

Each is drawn twice, wide and narrow, because scaled text is unreadable on a phone; charts.css shows one of the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sftflow.report.charts import round_step, svg, text

Points = list[tuple[float, float]]
Line = tuple[str, str, Points]  # name, class, points
MOST_LINES = 6  # that can still be told apart
WIDTHS = (900, 340)
LEFT, TOP, BOTTOM = 34, 28, 40  # margins


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` values on both sides.

    >>> smooth([4, 2, 3], 1)
    [4.0, 3.0, 2.5]

    Centred, because a trailing mean lags and would draw a falling loss above its own points. It narrows at the steep
    start, and is one-sided at the end, so that the last value is not one noisy step.
    """
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(i - min(reach, i), min(len(values), i + min(reach, i) + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers inside [low, high], about as many as wanted.

    >>> ticks(0.2, 3.1, 5)
    [1.0, 2.0, 3.0]
    """
    step = round_step(max(high - low, 1e-9) / wanted)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels near those wanted, at least `gap` apart, in the same order, inside [low, high].

    >>> spread([10, 12, 50], 8, 0, 100)
    [10, 18, 50]
    >>> spread([97, 98], 8, 0, 100)
    [92, 100]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = list(wanted)
    least, most = low, high
    for i in order:  # down from the top ...
        places[i] = max(places[i], least)
        least = places[i] + gap
    for i in reversed(order):  # ... and up again from the foot
        places[i] = min(places[i], most)
        most = places[i] - gap
    return places


def clipped(points: Points, top: float) -> list[Points]:
    """The pieces of a line that lie below `top`, cut where they cross it.

    >>> clipped([(0, 4.0), (2, 2.0), (3, 1.0)], 3.0)
    [[(1.0, 3.0), (2, 2.0), (3, 1.0)]]
    """
    crossed = points[:1]
    for (x0, y0), (x, y) in itertools.pairwise(points):
        if (y0 > top) != (y > top):
            crossed.append((x0 + (x - x0) * (top - y0) / (y - y0), top))
        crossed.append((x, y))
    return [list(piece) for above, piece in itertools.groupby(crossed, lambda point: point[1] > top) if not above]


@dataclass(frozen=True)
class Frame:
    """A line chart's window on its data: x0..x1, y0..y1 inside margins, in units of the drawing.

    named: lines that are named at their end, for which the right margin leaves room.
    """

    width: int
    x0: float
    x1: float
    y0: float
    y1: float
    unit: str
    named: Sequence[Line]
    height: int = 280

    @property
    def letters(self) -> int:
        """The longest name that is written whole."""
        return 9 if self.width < 500 else 18

    def at(self, x: float, y: float) -> tuple[float, float]:
        longest = max((len(name) for name, _, _ in self.named), default=0)
        right = 18 + 7 * min(self.letters, longest) if self.named else 12
        across = (x - self.x0) / ((self.x1 - self.x0) or 1)
        up = (y - self.y0) / ((self.y1 - self.y0) or 1)
        return (
            round(LEFT + (self.width - LEFT - right) * across, 1),
            round(TOP + (self.height - TOP - BOTTOM) * (1 - up), 1),
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
            out.append(text(a - 7, height + 4, "end", f"{y:g}"))
        for x in ticks(self.x0, self.x1, 4 if self.width < 500 else 8):
            out.append(text(self.at(x, self.y0)[0], self.height - BOTTOM + 18, "middle", f"{x:,g}"))
        out.append(text(2, 12, "start", self.unit))
        out.append(text(self.at(self.x1, self.y0)[0], self.height - 4, "end", "step"))
        return "".join(out)

    def named_ends(self) -> str:
        """Each line's name beside its last point, moved apart where they would cover each other, a stroke to each."""
        ends = [self.at(*points[-1]) for _, _, points in self.named]
        places = spread([y + 4 for _, y in ends], 13, TOP, self.height - BOTTOM + 4)
        out = []
        for (name, kind, _), (x, y), place in zip(self.named, ends, places, strict=True):
            cut = name if len(name) <= self.letters else name[: self.letters - 1] + "…"
            out.append(f'<path class="lead {kind}" d="M{x + 2} {y}L{x + 9} {place - 4:.1f}"/>')
            out.append(text(x + 12, round(place, 1), "start", cut, kind=f"name {kind}"))
        return "".join(out)

    def drawn(self, label: str, parts: Iterable[str]) -> Markup:
        kind = "narrow" if self.width < 500 else "wide"
        return svg(self.width, self.height, label, [self.axes(), *parts, self.named_ends()], kind)


def ceiling(raw: Points, held_out: Iterable[Points]) -> tuple[float, float]:
    """(the loss that the drawing ends at, the highest there is).

    What follows the first twentieth of the run fits whole. A base that does not know the format yet begins so much
    higher that all the rest would be a flat line.
    """
    points = [*raw, *itertools.chain.from_iterable(held_out)]
    steps = [x for x, _ in raw]
    early = min(steps) + (max(steps) - min(steps)) / 20
    highest = max(y for _, y in points)
    late = 1.15 * max((y for x, y in points if x > early), default=highest)
    return (highest if highest < 1.5 * late else late), highest


def loss_by_step(raw: Points, smoothed: Points, val: Points, sources: Mapping[str, Points]) -> Markup:
    """The loss of every step, smoothed, and held-out, as (step, loss) points.

    sources: held-out loss per source, thin lines with their names at the end, at most MOST_LINES of them. Held-out
    losses are far apart: no line leads to one above the drawing, for it would show losses that nobody measured.
    """
    top, _ = ceiling(raw, [val, *sources.values()])
    val, *each = ([p for p in points if p[1] <= top] or points for points in (val, *sources.values()))
    lines: list[Line] = [(name, f"s{i}", points) for i, (name, points) in enumerate(zip(sources, each, strict=True))]
    held_out = [val, *each]
    named: list[Line] = [("all", "val", val), *lines] if val and lines else lines
    xs = [x for x, _ in raw + val]
    floor = min(0.0, min(y for points in (raw, *held_out) for _, y in points))
    out = []
    for width in WIDTHS:
        frame = Frame(width, min(xs), max(xs), floor, top, "nats per supervised token", named)
        parts = [frame.path(raw, "raw")]
        parts += [frame.path(points, f"source {kind}") for _, kind, points in lines]
        parts += [frame.path(smoothed, "smooth"), frame.path(val, "val")]
        parts += [
            '<circle class="dot" r="3.5" cx="{}" cy="{}">'.format(*frame.at(x, y))
            + f"<title>step {x:,g}: held-out loss {y:.4f}</title></circle>"
            for x, y in val
            if y <= top
        ]
        out.append(frame.drawn("Loss by step", parts))
    return Markup("").join(out)


def scores_by_step(scores: Mapping[str, Points]) -> Markup:
    """Shares in 0..1 by step, in percent; the first MOST_LINES of them."""
    first = itertools.islice(scores.items(), MOST_LINES)
    lines: list[Line] = [(name, f"s{i}", [(x, 100 * y) for x, y in points]) for i, (name, points) in enumerate(first)]
    xs = [x for _, _, points in lines for x, _ in points]
    frames = [Frame(width, min(xs), max(xs), 0.0, 100.0, "percent of a sample", lines, height=220) for width in WIDTHS]
    return Markup("").join(
        frame.drawn("Scores by step", [frame.path(points, f"source {kind}") for _, kind, points in lines])
        for frame in frames
    )
