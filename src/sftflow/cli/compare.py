"""`sftflow compare`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sftflow.cli.common import (
    MODEL_HELP,
    TASKS_HELP,
    AllowCode,
    Limit,
    MaxTokens,
    Out,
    Samples,
    Shots,
    Temperature,
    Thinking,
    app,
    is_on,
    print_table,
    say,
    split_tasks,
)
from sftflow.cli.processes import RERUN, Nproc, processes

if TYPE_CHECKING:
    from sftflow.api import Comparison


@app.command()
def compare(
    base_model: Annotated[str, typer.Argument(metavar="BASE", help=MODEL_HELP)],
    sft: Annotated[str, typer.Argument(metavar="SFT", help=MODEL_HELP)],
    out: Out,
    tasks: Annotated[str | None, typer.Option("--tasks", help=f"{TASKS_HELP}; none asks the prompts only")] = None,
    prompts: Annotated[
        str,
        typer.Option(help='default, or JSON lines: a text, {"prompt": TEXT, "expects": [["Paris"]]} or messages'),
    ] = "default",
    limit: Limit = None,
    shots: Shots = 0,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = None,
    thinking: Thinking = None,
    allow_code: AllowCode = False,
    judge: Annotated[
        str | None, typer.Option(help="OpenAI-compatible URL of a judge; its key is read from SFTFLOW_JUDGE_KEY")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="the judge's model id")] = None,
    nproc: Nproc = 1,
) -> None:
    """Base versus SFT on the same tasks and the same fixed prompts; compare.json and report.html."""
    with processes(nproc, RERUN):
        from sftflow import api

        found = api.compare(
            base_model,
            sft,
            split_tasks(tasks),
            prompts=prompts,
            limit=limit,
            allow_code=allow_code,
            shots=shots,
            samples=samples,
            temperature=temperature,
            max_tokens=max_tokens,
            thinking=is_on(thinking),
            judge=judge,
            judge_model=judge_model,
            out=out,
        )
        tell_comparison(found)
        say(f"report:        {out / 'report.html'}")


def tell_comparison(comparison: Comparison) -> None:
    from sftflow.report.tables import comparison_tables

    for table in comparison_tables(comparison):
        say("")
        print_table(table)
    for line in comparison.remarks():
        say(line)
