"""`sftflow doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Set, app
from sftflow.foundation.errors import RecipeError


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="a YAML recipe to check, too")] = None,
    set_: Set = None,
    math: Annotated[bool, typer.Option("--math", help="prove packing and loss on this machine")] = False,
) -> None:
    """Say what this machine can do, and whether a recipe would run."""
    if set_ and recipe is None:
        raise RecipeError(f"--set {set_[0]}", "there is no recipe to change", "name the recipe, too")
    from sftflow import api

    lines, good = api.doctor(recipe, set_ or (), math=math)
    for line in lines:
        print(line)
    if not good:
        raise typer.Exit(1)
