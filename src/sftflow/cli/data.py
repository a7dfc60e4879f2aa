"""`render` and `mix`: what the model sees, and what it would be trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sftflow.cli.common import MODEL_HELP, app, quiet
from sftflow.errors import RecipeError, SftflowError


def _first(conversations: Any, n: int) -> list[Any]:
    """The first n conversations, or those before the first bad row (which is named when its turn comes)."""
    from itertools import islice

    out: list[Any] = []
    try:
        out.extend(islice(conversations, n))
    except SftflowError:
        return out
    return out


@app.command()
def render(
    data: Annotated[str, typer.Argument(help="conversations: .jsonl, .json, .parquet or hub:NAME")],
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP}; a directory with a tokenizer is enough")],
    format: Annotated[str, typer.Option(help="auto, a built-in format, or a .jinja file")] = "auto",
    index: Annotated[int | None, typer.Option(min=0, help="only this row, counted from 0")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with every token as a box")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    append_eos: Annotated[bool, typer.Option(help="put the end of text behind replies that have no end")] = False,
) -> None:
    """Show rows as the model sees them: tokens, and which of them are trained on."""
    quiet()
    from sftflow.chat import template_options
    from sftflow.chat.data_files import read_conversations
    from sftflow.chat.token_rows import TokenRow, token_row
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.errors import MaskError
    from sftflow.report.token_view import terminal_lines

    renderer = open_renderer(resolve(model), format)
    if append_eos:
        renderer = template_options.append_eos(renderer)
    if renderer.arguments():
        renderer = template_options.choose_arguments(renderer, _first(read_conversations(data), 200))
    for note in (template_options.options_note(renderer), renderer.disagreement()):
        if note:
            print(note, file=sys.stderr)
    tokenizer = renderer.tokenizer
    rows: list[TokenRow] = []
    refused: list[dict[str, str]] = []
    for number, conversation in enumerate(read_conversations(data)):
        if index is not None and number != index:
            continue
        try:
            for rendered in renderer.render_rows(conversation, turns=True):
                rows.append(token_row(rendered, tokenizer))
        except MaskError as error:
            refused.append({"source": conversation.source, "reason": str(error)})
        if number == index:
            break
    if index is not None and not rows and not refused:
        raise RecipeError(f"--index {index}", f"{data} has not so many rows", "give a smaller number")
    if html is not None:
        from sftflow.atomic_io import write_text
        from sftflow.report.token_page import token_page

        write_text(html, token_page([*rows, *(TokenRow(r["source"], refused=r["reason"]) for r in refused)]))
    if as_json:
        document = {
            "rows": [
                {
                    "source": r.source,
                    "ids": [t.id for t in r.tokens],
                    "mask": [int(t.supervised) for t in r.tokens],
                    "tokens": [t.text for t in r.tokens],
                }
                for r in rows
            ],
            "refused": refused,
        }
        print(json.dumps(document, ensure_ascii=False))
    elif html is None:
        from rich.console import Console

        console = Console(highlight=False)
        for row in rows:
            head = f"{row.source}  {len(row.tokens)} tokens, {row.n_supervised} supervised"
            console.print(head, style="bold underline", markup=False, soft_wrap=True)
            console.print(terminal_lines(row))
    for entry in refused:
        print(f"refused: {entry['reason']}", file=sys.stderr)
    if html is not None:
        print(f"wrote {html}", file=sys.stderr)
    if refused:
        raise typer.Exit(1)


@app.command()
def mix(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    out: Annotated[Path | None, typer.Option(help="write ledger.json (and bad_rows.jsonl) here")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page with histograms and one rendered row of each source")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the ledger on stdout")] = False,
) -> None:
    """Audit a recipe's mixture: every row rendered, proven and accounted for."""
    quiet()
    from rich.console import Console

    from sftflow.atomic_io import write_json, write_text
    from sftflow.chat.template_options import options_note
    from sftflow.chat.token_rows import token_row
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.data.audit import audit, item_parts
    from sftflow.data.mixture import build_mixture, write_bad_rows
    from sftflow.evaluation.options import open_tasks
    from sftflow.recipe import load_recipe
    from sftflow.report.audit_page import audit_page
    from sftflow.report.progress import ProgressDisplay
    from sftflow.report.tables import audit_tables, ledger_table

    loaded = load_recipe(recipe)
    tasks = list(loaded.eval.tasks) if loaded.eval else []
    # Nothing is asked here, so nothing that a model wrote runs: its items are only compared with the rows.
    limit = loaded.eval.limit if loaded.eval else None
    evaluation = open_tasks(tasks, limit, loaded.identity.model_dump(), allow_code=True)
    with ProgressDisplay() as watch:
        mixture = build_mixture(
            loaded, open_renderer(resolve(loaded.base), loaded.format), watch.rendering, every_row=True
        )
        tokenizer = mixture.renderer.tokenizer
        found = audit(
            mixture.rows,
            lambda ids: tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True),
            eval_sets={task.name: [item_parts(item) for item in task.items] for task in evaluation},
            special_ids=list(mixture.renderer.special.values()),
            progress=lambda done, total: watch.counted("audit", done, total),
        )
        for note in (options_note(mixture.renderer), mixture.renderer.disagreement()):
            if note:
                watch.say(note)
    ledger = found.into(mixture.ledger())
    if out is not None:
        write_json(out / "ledger.json", ledger)
        write_bad_rows(out, mixture)
    if html is not None:
        write_text(html, audit_page(ledger, [token_row(r, tokenizer) for r in mixture.samples]))
    if as_json:
        print(json.dumps(ledger, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(ledger_table(ledger))
        console.print(
            f"{ledger['packed_rows']:,} packed rows of {mixture.max_length}, {ledger['padding_share']:.1%} padding, "
            f"{ledger['validation_rows']:,} rows held out"
        )
        for table in audit_tables(ledger):
            console.print()
            console.print(table)
        for row in mixture.bad[:5]:
            console.print(f"skipped: {row['reason']}", markup=False)
    mixture.prove()
