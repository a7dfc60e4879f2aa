"""`sftflow mix`"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Set, app, print_table


@app.command()
def mix(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="write ledger.json (and bad_rows.jsonl) here")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page with histograms and one rendered row of each source")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the ledger on stdout")] = False,
) -> None:
    """Audit a recipe's mixture: every row rendered, proven and accounted for."""
    from sftflow import api

    found = api.audit(recipe, set_ or ())
    ledger = found.ledger
    if out is not None:
        found.save(out)
    if html is not None:
        found.save_html(html)
    if as_json:
        print(json.dumps(ledger, ensure_ascii=False))
    else:
        from sftflow.report.tables import audit_tables, ledger_table

        print_table(ledger_table(ledger))
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
