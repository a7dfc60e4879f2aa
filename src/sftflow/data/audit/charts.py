"""The audit's histograms of row lengths, and the page's section around them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sftflow.data.audit.markup import Data, count, section, table
from sftflow.report.token_page import esc

WIDTH, HEIGHT = 360, 148  # of a histogram, in its own units: about a phone's width, so that its text is not scaled
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 18, 32


def lengths_section(ledger: Data) -> str:
    shown = [(s, s["lengths"]) for s in ledger["sources"] if s.get("lengths")]
    if not shown:
        return ""
    limit = ledger.get("max_length")
    figures = "".join(
        f"<figure><figcaption><b>{esc(s['name'])}</b>{_length_words(s)}</figcaption>"
        f"{histogram(lengths['histogram']['edges'], lengths['histogram']['counts'], limit, s['name'])}</figure>"
        for s, lengths in shown
    )
    keys = ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max", "mean")
    named: list[Data] = [s for s, _ in shown]
    if ledger.get("lengths"):
        named.append({**ledger, "name": "all"})
    numbers = "".join(
        f"<h3>{title}</h3>"
        + table(
            ("source", *keys),
            [
                [esc(s["name"]), *(f"{s[part][k]:,}" if k != "mean" else f"{s[part][k]:,.1f}" for k in keys)]
                for s in named
            ],
        )
        for title, part in (("Tokens of a row", "lengths"), ("Supervised tokens of a row", "supervised"))
    )
    note = "The axes of the tokens are the same, and logarithmic; the heights are each source's own."
    body = f'<div class="plots">{figures}</div><details><summary>Quantiles</summary>{numbers}</details>'
    return section("Lengths", body, note)


def _length_words(s: Data) -> str:
    n = s["lengths"]
    said = f"median {n['p50']:,}, 95% up to {n['p95']:,}, longest {n['max']:,}"
    lost = [f"{s[key]:,} {key}" for key in ("cut", "dropped") if s.get(key)]
    return said + (f' · <span class="lost">{", ".join(lost)}</span>' if lost else "")


def histogram(edges: Sequence[int], counts: Sequence[int], limit: int | None, name: str) -> str:
    """AuditRows by their tokens, on a logarithmic axis that reaches to `limit`, the longest row that is trained on."""
    low, high = float(edges[0]), float(max(edges[-1], limit or 0))
    grid = heights(max(1, *counts))
    top = grid[-1]

    def across(tokens: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * math.log(tokens / low) / math.log(high / low), 1)

    def up(rows: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rows / top, 1)

    floor = HEIGHT - BOTTOM
    out = []
    for rows in grid:
        out.append(f'<path class="grid" d="M{LEFT} {up(rows)}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 5}" y="{up(rows) + 4}" text-anchor="end">{short(rows)}</text>')
    bars = []
    for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True):
        if n:
            # A bar of one row among thousands must still be seen.
            tall = max(floor - up(n), 1.0)
            x, wide = across(a) + 0.5, max(across(b) - across(a) - 1, 1)
            said = f"{a:,} to {b - 1:,} tokens: {count(n, 'row')}"
            box = f'x="{x:.1f}" y="{floor - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
            bars.append(f"<rect {box}><title>{said}</title></rect>")
    out.append(f'<g class="bars">{"".join(bars)}</g>')
    last = -1e9
    for tick in (m * 10**d for d in range(8) for m in (1, 2, 5)):
        if low <= tick <= high and across(tick) - last >= 34:
            last = across(tick)
            out.append(f'<path class="grid" d="M{last} {floor}v4"/>')
            out.append(f'<text x="{last}" y="{floor + 15}" text-anchor="middle">{short(tick)}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">tokens of a row</text>')
    out.append(f'<text x="{LEFT - 5}" y="9" text-anchor="end">rows</text>')
    if limit and limit >= low:
        at = across(limit)
        side = "end" if at > WIDTH / 2 else "start"
        out.append(f'<path class="limit" d="M{at} {TOP - 6}V{floor}"/>')
        out.append(f'<text class="limit-name" x="{at}" y="9" text-anchor="{side}">max_length {limit:,}</text>')
    label = f"{name}: rows by their number of tokens, {edges[0]:,} to {edges[-1]:,}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(label)}">{"".join(out)}</svg>'


def heights(most: int) -> list[int]:
    """Round numbers from 0 to the first that is not below `most`, at most five steps apart.

    >>> heights(2), heights(58), heights(7300)
    ([0, 1, 2], [0, 20, 40, 60], [0, 2000, 4000, 6000, 8000])
    """
    step = next(m * 10**d for d in range(16) for m in (1, 2, 5) if 4 * m * 10**d >= most)
    return list(range(0, most + step, step))[: -(-most // step) + 1]


def short(n: float) -> str:
    """
    >>> short(512), short(2400), short(13000)
    ('512', '2.4k', '13k')
    """
    return f"{n:g}" if n < 1000 else f"{n / 1000:.3g}k" if n < 1e6 else f"{n / 1e6:.3g}M"
