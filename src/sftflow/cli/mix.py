"""`sftflow mix`"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Set, app, print_table
from sftflow.foundation.errors import RecipeError


@app.command()
def mix(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="write ledger.json (and bad_rows.jsonl) here")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page with histograms and one rendered row of each source")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="only render part I of N into the cache (I from 1; 0/N is N/N); no audit"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the ledger (or what is told of the part) on stdout")] = False,
) -> None:
    """Audit a recipe's mixture: every row rendered, proven and accounted for."""
    from sftflow import api

    if part is not None:
        if out is not None or html is not None:
            option = "--out" if html is None else "--html"
            fact = f"{option} writes the audit of all rows, and a part has no audit"
            raise RecipeError("--part", fact, f"give {option} to the sftflow mix that comes after all parts")
        prepared = api.prepare_part(recipe, part, set_ or ())
        print(json.dumps(prepared.to_json()) if as_json else prepared)
        return
    found = api.audit(recipe, set_ or ())
    ledger = found.ledger
    if out is not None:
        found.save(out)
    if html is not None:
        found.save_html(html)
    if as_json:
        print(json.dumps(ledger, ensure_ascii=False))
    else:
        from sftflow.report.tables import audit_tables, mixture_tables

        for number, table in enumerate(mixture_tables(ledger)):
            print("\n" * bool(number), end="")
            print_table(table)
        print(
            f"{ledger['packed_rows']:,} packed rows of {ledger['max_length']}, {ledger['padding_share']:.1%} padding, "
            f"{ledger['validation_rows']:,} rows held out"
        )
        for line in found.mixture.notes():
            print(textwrap.fill(line, 80, break_long_words=False, break_on_hyphens=False))
        for table in audit_tables(ledger):
            print()
            print_table(table)
        for reason in ledger["bad_rows"][:5]:
            print(f"skipped: {reason}")
    found.prove()
