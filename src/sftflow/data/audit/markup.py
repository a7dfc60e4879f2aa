"""Small pieces of the audit's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftflow.report.token_page import esc

Data = Mapping[str, Any]


def percent(part: float, whole: float = 1.0) -> str:
    """
    >>> percent(1, 3), percent(1, 3000), percent(0, 3)
    ('33%', '<1%', '0%')
    """
    share = part / whole if whole else 0.0
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def count(n: float, one: str) -> str:
    """
    >>> count(1, "row"), count(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {one}{'s' * (n != 1)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], foot: Sequence[str] = (), left: int = -1) -> str:
    """Cells are markup. The first names the row; `left` is the column of running text, if there is one."""

    def line(cells: Sequence[str]) -> str:
        out = f'<th scope="row">{cells[0]}</th>'
        for i, (name, cell) in enumerate(zip(columns[1:], cells[1:], strict=True), 1):
            kind = " ".join(k for k, on in (("left all", i == left), ("none", not cell), ("zero", cell == "0")) if on)
            out += f'<td{f" class={chr(34)}{kind}{chr(34)}" if kind else ""} data-label="{esc(name)}">{cell}</td>'
        return f"<tr>{out}</tr>"

    head = "".join(f'<th scope="col"{" class=left" if i == left else ""}>{esc(c)}</th>' for i, c in enumerate(columns))
    end = f"<tfoot>{line(foot)}</tfoot>" if foot else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(line, rows))}</tbody>{end}</table>"


def section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note small">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>"


def fold(name: object, aside: str, body: str) -> str:
    """Something to open; `aside` says in its line how much there is."""
    return f'<details><summary>{esc(name)} <span class="soft">{aside}</span></summary>{body}</details>'
