"""`sftflow data`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Set, app, print_table


@app.command()
def data(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe, or builtin:NAME")],
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as one JSON document on stdout")] = False,
) -> None:
    """Say what a recipe needs, what of it is there, and how to get the rest; 1 where something is missing."""
    from rich.table import Table
    from rich.text import Text

    from sftflow.data.needs import MADE, needs_of
    from sftflow.recipe import load_recipe

    needs = needs_of(load_recipe(recipe, set_ or ()))
    missing = [need for need in needs if not need.there]
    if as_json:
        print(json.dumps({"needs": [need.to_json() for need in needs], "missing": len(missing)}, ensure_ascii=False))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("for", "name", "there", "size", "rows", "licence"):
            numbers = name in ("size", "rows")
            table.add_column(name, justify="right" if numbers else "left", no_wrap=name != "name", overflow="fold")
        for need in needs:
            size = "" if need.bytes is None else _size(need.bytes)
            rows = "" if need.rows is None else f"{need.rows:,}"
            there = "built in" if need.where == MADE else "yes" if need.there else "NO"
            cells = (need.what, need.name, there, size, rows, need.licence or "")
            table.add_row(*map(Text, cells))
        print_table(table)
        for need in missing:
            print(f"\n{need.where} ({need.what}) is not there:\n  {need.get}")
    if missing:
        raise typer.Exit(1)


def _size(n: float) -> str:
    """
    >>> _size(900), _size(4_166_206), _size(98_000_000_000)
    ('1 KB', '4.2 MB', '98.0 GB')
    """
    for unit in ("KB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}" if unit != "KB" else f"{max(1, round(n))} KB"
    return f"{n / 1000:.1f} GB"
