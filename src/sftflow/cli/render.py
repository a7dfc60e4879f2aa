"""`sftflow render`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import MODEL_HELP, app


@app.command()
def render(
    data: Annotated[
        str,
        typer.Argument(
            help="conversations: a file (JSON lines, a JSON array, CSV, Parquet, Arrow, also packed), a folder or a "
            "pattern of these, or hub:OWNER/NAME[@REVISION][[:CONFIG]:SPLIT]"
        ),
    ],
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP}; a directory with a tokenizer is enough")],
    format: Annotated[str, typer.Option(help="auto, a built-in format, or a .jinja file")] = "auto",
    config: Annotated[str | None, typer.Option(help="of a data set with several configurations")] = None,
    index: Annotated[int | None, typer.Option(min=0, help="only this row, counted from 0")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with every token as a box")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    append_eos: Annotated[bool, typer.Option(help="put the end of text behind replies that have no end")] = False,
    drop_prefill: Annotated[
        bool, typer.Option(help="prompts without what the template begins every reply with")
    ] = False,
    supervise: Annotated[str, typer.Option(help="what is taught: replies, or all tokens")] = "replies",
    columns: Annotated[
        str | None, typer.Option(help="what a table calls ours: question=prompt,answer=completion")
    ] = None,
    turns: Annotated[str, typer.Option(help="which replies are taught: all, or each conversation's last")] = "all",
    join_turns: Annotated[
        bool, typer.Option(help="join messages in a row of the user, and of the assistant, by a blank line")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="the rows are plain text: {text: ...}, or a file a document")
    ] = False,
) -> None:
    """Show rows as the model sees them: tokens, and which of them are trained on."""
    from sftflow import api
    from sftflow.chat.columns import parse_columns

    found = api.render(
        data,
        model,
        config=config,
        format=format,
        index=index,
        append_eos=append_eos,
        drop_prefill=drop_prefill,
        supervise=supervise,
        columns=None if columns is None else parse_columns(columns),
        turns=turns,
        join_turns=join_turns,
        text=text,
    )
    for note in found.notes:
        print(note, file=sys.stderr)
    if html is not None:
        found.save_html(html)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    elif html is None:
        from rich.console import Console

        from sftflow.report.token_view import TerminalRow

        console = Console(highlight=False)
        for row in found.rows:
            head = f"{row.source}  {len(row.tokens)} tokens, {row.n_supervised} supervised"
            console.print(head, style="bold underline", markup=False, soft_wrap=True)
            console.print(TerminalRow(row))
    for entry in found.refused:
        print(f"refused: {entry['reason']}", file=sys.stderr)
    if html is not None:
        print(f"wrote {html}", file=sys.stderr)
    if found.refused:
        raise typer.Exit(found.exit_code)
