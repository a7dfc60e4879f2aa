"""What the commands have in common: the application, its options, and how results are printed."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftflow.foundation.counts import count_of
from sftflow.foundation.errors import RecipeError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a base checkpoint to a measured, served assistant: chat format, task mixture, supervised "
    "fine-tuning, evaluation, base-versus-SFT comparison, serving.",
)


class Switch(StrEnum):
    on = "on"
    off = "off"


MODEL_HELP = "a checkpoint or run directory, a base directory of picollm, a hub id, a .gguf file, or builtin:tiny"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.steps=30 or mixture.0.limit=5"),
]
Out = Annotated[Path, typer.Option("--out", help="where the results go")]
TASKS_HELP = "NAME, NAME=PATH or ./FILE.py:CLASS, separated by commas (docs/evaluation.md lists them, docs/tasks.md)"
Tasks = Annotated[str | None, typer.Option("--tasks", help=TASKS_HELP)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="at most so many items a task")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="run code that the model wrote, in a sandbox")]
Shots = Annotated[int, typer.Option("--shots", min=0, metavar="N", help="examples in front of each item")]
Samples = Annotated[int, typer.Option("--samples", min=1, metavar="K", help="replies an item; needs --temperature")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, metavar="T", help="0: greedy")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, metavar="N", help="of a reply, in place of the task's own")
]
Thinking = Annotated[
    Switch | None,
    typer.Option("--thinking", help="whether the chat template asks for thoughts; else as it stands"),
]


def is_on(switch: Switch | None) -> bool | None:
    return None if switch is None else switch is Switch.on


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"sftflow {version('sftflow')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["SFTFLOW_DEBUG"] = "1"


def split_tasks(tasks: str | None) -> list[str] | None:
    """ "a,b=PATH" -> ["a", "b=PATH"]; None, for the generated tasks, where nothing is said."""
    if tasks is None:
        return None
    named = [t for t in tasks.split(",") if t.strip()]
    if not named:
        raise RecipeError("--tasks", f"no task is named in {tasks!r}", "leave it out to ask the generated ones")
    return named


def number(text: str, place: str) -> int:
    """3.4M, 20M, 4096 -> an int."""
    try:
        return count_of(text)
    except ValueError as error:
        fact, _, remedy = str(error).partition("; ")
        raise RecipeError(place, fact, remedy) from None


def say(text: str | Text) -> None:
    """A line for the person, on standard error."""
    from sftflow.report.progress import stderr

    stderr().print(text, highlight=False, markup=False, soft_wrap=None if isinstance(text, str) else True)


def print_table(table: Table) -> None:
    """A result, on standard output."""
    from rich.console import Console

    Console(highlight=False).print(table)
