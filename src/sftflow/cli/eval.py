"""`sftflow eval`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sftflow.cli.common import MODEL_HELP, AllowCode, Limit, Out, Tasks, app, print_table, say, split_tasks
from sftflow.cli.processes import RERUN, Nproc, processes

if TYPE_CHECKING:
    from sftflow.api import Evaluation


@app.command("eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Out,
    tasks: Tasks = None,
    limit: Limit = None,
    allow_code: AllowCode = False,
    nproc: Nproc = 1,
) -> None:
    """Score models on tasks; a row an item, and eval.json. A rerun goes on from finished rows."""
    with processes(nproc, RERUN):
        from sftflow import api

        tell_evaluation(api.evaluate(models, split_tasks(tasks), limit=limit, allow_code=allow_code, out=out))
        say(f"rows and eval.json are in {out}")


def tell_evaluation(evaluation: Evaluation) -> None:
    from sftflow.report.tables import eval_table

    say("")
    print_table(eval_table(evaluation))
