"""`sftflow train`"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftflow.cli.common import Set, app, say
from sftflow.cli.processes import Nproc, processes, tells

if TYPE_CHECKING:
    from sftflow.api import Run


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run that is in train.out")] = False,
    nproc: Nproc = 1,
) -> None:
    """Fine-tune as the recipe says; evaluate and compare where it asks for it."""
    from sftflow.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    with processes(nproc), stopping(Path(loaded.train.out), overwrite=overwrite):
        from sftflow import api

        finish(api.train(recipe=loaded, resume=resume, overwrite=overwrite))


@contextmanager
def stopping(out: Path, *, overwrite: bool = False) -> Iterator[None]:
    """A stopped run says what was saved, and leaves with the signal's exit code, while libraries are imported, too."""
    from sftflow.training.signals import Signals, Stopped

    done = out / "DONE"
    earlier = done.read_bytes() if overwrite and done.is_file() else None
    try:
        with Signals():
            yield
    except Stopped as stopped:
        saved = any((out / "resume").glob("step-*"))
        if done.is_file() and done.read_bytes() == earlier:
            fact = "the run that is there has not been replaced"
        elif done.is_file():
            fact = "the training itself is finished; --resume goes on with what comes after it"
        elif stopped.saved:
            fact = f"the state is saved in {out / 'resume'}; --resume goes on"
        else:
            fact = f"{out / 'resume'} is as it was; --resume goes on" if saved else "nothing had been saved yet"
        if tells(stopped):
            print(f"stopped; {fact}", file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def finish(run: Run) -> None:
    """The scores, where the recipe asked for them, and how the run ended."""
    from sftflow.cli.compare import tell_comparison
    from sftflow.cli.eval import tell_evaluation

    if run.evaluation is not None:
        tell_evaluation(run.evaluation)
    if run.comparison is not None:
        tell_comparison(run.comparison)
    say("")
    say(run.ending())
