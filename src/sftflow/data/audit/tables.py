"""The audit of a mixture in the terminal: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table


def audit_tables(ledger: Mapping[str, Any]) -> list[Table]:
    """Of a ledger with the audit's keys: each source's lengths and repeats, overlap, invariants; what is there."""
    out = []
    if "duplicates" in ledger:
        out.append(_lengths(ledger))
    if ledger.get("overlap"):
        out.append(_overlap(ledger["overlap"]))
    if ledger.get("invariants"):
        out.append(_invariants(ledger["invariants"]))
    return out


def _table(*columns: str, text: tuple[int, ...] = (0,)) -> Table:
    """`text`: columns that fold; the others hold numbers."""
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        words = i in text
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _lengths(ledger: Mapping[str, Any]) -> Table:
    table = _table("length", "p5", "median", "p95", "max", "superv.", "repeats", "near-repeats")
    for name, s in (*((s["name"], s) for s in ledger["sources"]), ("all", ledger)):
        n = s["lengths"]
        if name == "all" and s is ledger:
            table.add_section()
        table.add_row(
            escape(str(name)),
            *(f"{n[key]:,}" for key in ("p5", "p50", "p95", "max")),
            f"{s['supervised']['share']:.0%}",
            f"{s['duplicates']['rows']:,}",
            f"{s['near_duplicates']['rows']:,}",
        )
    return table


def _overlap(tasks: Mapping[str, Any]) -> Table:
    table = _table("overlap with", "items", "found", "share", "not checked", "found in", text=(0, 5))
    for name, t in tasks.items():
        where = ", ".join(f"{s['name']} {s['items']:,}" for s in t["sources"] if s["items"])
        colour = "red" if t["contaminated"] else "green"
        table.add_row(
            escape(name),
            f"{t['items']:,}",
            f"[{colour}]{t['contaminated']:,}[/]",
            f"{t['share']:.1%}",
            f"{t['unchecked']:,}",
            escape(where),
        )
    return table


def _invariants(found: Mapping[str, Any]) -> Table:
    table = _table("what must hold", "checked", "failed", "first failure", text=(0, 3))
    for name, i in found.items():
        colour = "red" if i["failed"] else "green" if i["checked"] else "yellow"
        failed = f"[{colour}]{i['failed']:,}[/]"
        table.add_row(escape(name), f"{i['checked']:,}", failed, escape(i.get("first") or ""))
    return table
