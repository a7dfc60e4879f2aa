"""`doctor`: what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import app, quiet


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="check this recipe too")] = None,
    math: Annotated[bool, typer.Option("--math", help="prove packing and loss on this machine")] = False,
) -> None:
    """Say what this machine can do, and whether a recipe would run."""
    quiet()
    from rich.console import Console

    from sftflow.doctor import examine

    lines, good = examine(recipe, math)
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)
    if not good:
        raise typer.Exit(1)
