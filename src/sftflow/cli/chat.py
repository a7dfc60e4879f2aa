"""`sftflow chat`: a conversation in the terminal, or the replies to a file's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Exit, Option

from sftflow.cli.common import Model, app, say
from sftflow.foundation.errors import RecipeError


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, Option(help="ask once and print the reply")] = None,
    input: Annotated[str | None, Option(help="ask every row of a file, of any dialect, or a question a row")] = None,
    out: Annotated[
        Path | None, Option(help="of --input: the replies, rows to train on; goes on from what is there")
    ] = None,
    system: Annotated[str | None, Option(help="a system message")] = None,
    base_model: Annotated[str | None, Option("--base", help="what /base asks; else the one trained from")] = None,
    temperature: Annotated[float | None, Option(min=0, max=2, help="0: the likeliest token")] = None,
    top_p: Annotated[float | None, Option(min=0, max=1, help="draw from the likeliest share")] = None,
    seed: Annotated[int | None, Option(min=-(2**63), max=2**63 - 1, help="of a reply; /retry takes the next")] = None,
    max_tokens: Annotated[int | None, Option(min=1, help="of a reply; else 1,024")] = None,
    columns: Annotated[
        str | None, Option(help="of --input: what a table calls ours: question=prompt,answer=completion")
    ] = None,
    on_bad_row: Annotated[
        Literal["stop", "skip"] | None, Option(help="of --input: where a row cannot be asked; else stop")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="of --input: begin --out anew")] = False,
) -> None:
    """Talk to a model in the terminal, or ask it a file. How tokens are drawn is the checkpoint's own choice where
    nothing is said."""
    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    drawn = {key: value for key, value in given.items() if value is not None}
    if input is not None and out is not None and prompt is None and base_model is None:
        how = {"system": system, "on_bad_row": on_bad_row or "stop", "overwrite": overwrite}
        _ask_file(model, input, out, columns, **how, **drawn)
        return
    if input is not None:
        if out is None:
            raise RecipeError("--input", "the replies go to a file", "give --out replies.jsonl")
        other = "--base" if prompt is None else "--prompt"
        raise RecipeError(other, "--input asks the rows of a file, and nothing else", "leave one of them out")
    alone = {"--out": out, "--columns": columns, "--on-bad-row": on_bad_row, "--overwrite": overwrite or None}
    for option in (name for name, value in alone.items() if value is not None):
        raise RecipeError(option, "it belongs to --input", "give --input FILE, or leave it out")
    from sftflow import api

    api.talk(model, prompt=prompt, system=system, base=base_model, **drawn)


def _ask_file(model: str, rows: str, out: Path, columns: str | None, **how: Any) -> None:
    """Ask every row. A stopped one says what is there, and leaves with the signal's exit code."""
    from sftflow.training.signals import Signals, Stopped

    try:
        with Signals():
            from sftflow import api
            from sftflow.chat.columns import parse_columns

            named = None if columns is None else parse_columns(columns)
            say(f"chat: {api.ask_rows(model, rows, out, columns=named, **how)}")
    except Stopped as stopped:
        said = f"the same command goes on from the rows in {out}" if out.exists() else "nothing had been written yet"
        say(f"stopped; {said}")
        raise Exit(stopped.exit_code) from None
