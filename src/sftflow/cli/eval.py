"""`sftflow eval`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sftflow.cli.common import (
    MODEL_HELP,
    AllowCode,
    Limit,
    MaxTokens,
    Out,
    Samples,
    Shots,
    Tasks,
    Temperature,
    Thinking,
    app,
    is_on,
    print_table,
    say,
    split_tasks,
)
from sftflow.cli.processes import RERUN, Nproc, processes
from sftflow.foundation.errors import TaskError

if TYPE_CHECKING:
    from sftflow.api import Evaluation

Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="TASK=X", help="exit with 1 where a model's score is below X (0 to 1)"),
]


@app.command("eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = 0,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = None,
    thinking: Thinking = None,
    require: Require = None,
    allow_code: AllowCode = False,
    nproc: Nproc = 1,
) -> None:
    """Score models on tasks; a row a reply, and eval.json. A rerun goes on from finished rows."""
    bars = dict(map(_bar, require or ()))
    with processes(nproc, RERUN):
        from sftflow import api

        missed: list[str] = []
        try:
            evaluation = api.evaluate(
                models,
                split_tasks(tasks),
                limit=limit,
                allow_code=allow_code,
                shots=shots,
                samples=samples,
                temperature=temperature,
                max_tokens=max_tokens,
                thinking=is_on(thinking),
                require=bars,
                out=out,
            )
        except api.BarMissed as error:
            evaluation, missed = error.evaluation, error.missed
        tell_evaluation(evaluation)
        say(f"rows and eval.json are in {out}")
        for line in missed:
            say(f"missed: {line}")
        if missed:
            raise typer.Exit(1)


def _bar(text: str) -> tuple[str, float]:
    """ "gsm8k=0.3" -> ("gsm8k", 0.3)"""
    name, found, value = text.rpartition("=")
    if name.endswith(("<", ">")):
        fact = f"{text!r} is not TASK=X, which asks for X or more"
        raise TaskError("--require", fact, f"write --require {name[:-1].strip()}={value.strip()}")
    try:
        if found and name.strip():
            return name.strip(), float(value)
    except ValueError:
        pass
    raise TaskError("--require", f"{text!r} is not TASK=X", "write for example --require gsm8k=0.3")


def tell_evaluation(evaluation: Evaluation) -> None:
    from sftflow.report.tables import eval_table

    say("")
    print_table(eval_table(evaluation))
