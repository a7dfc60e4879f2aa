"""What is wrong with a command line, and where to read on: other programs' options and commands lead to ours."""

from __future__ import annotations

import sys
from typing import Any

from sftflow import other_trainers
from sftflow.cli.common import app


def told(error: Any) -> str:
    """One line for a usage error of the command-line library."""
    context = getattr(error, "ctx", None)
    name = str(context.info_name) if context is not None and context.parent is not None else ""
    if context is None:  # of an option without its value
        ours = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
        name = next((word for word in sys.argv[1:] if word in ours), "")
    said = " ".join(str(error.format_message()).split()).removesuffix(".").replace(" Value error,", "")
    said = said.replace("Input should be", "it should be").partition(", unable to parse")[0]
    said = said.replace("a valid integer", "a whole number").replace("a valid number", "a number")
    said = said.replace(" (Possible options: --help)", "")
    if said.startswith("Missing ") and (about := getattr(getattr(error, "param", None), "help", "")):
        said += f" ({about})"
    lead = _lead(error, context.command, name) if context is not None else ""
    if lead:
        said = said.partition(" (Possible options")[0]
    return f"usage: {said}; {f'{lead}; ' if lead else ''}see {f'sftflow {name}'.strip()} --help"


def _lead(error: Any, asked: Any, command: str) -> str:
    """What to write in place of an option or a command that is another program's; "" where it is no one's."""
    option = getattr(error, "option_name", None)
    if option is None:
        name = other_trainers.normal(str(error.format_message()).partition("No such command '")[2].partition("'")[0])
        near = (ours for ours, theirs in other_trainers.COMMANDS.items() if name in theirs.replace("-", "_").split())
        return next((f"write sftflow {found}" for found in near), "")
    name = other_trainers.normal(option)
    has = [opt for parameter in asked.params for opt in parameter.opts]
    if "--set" in has:
        from sftflow.recipe import Recipe
        from sftflow.recipe_words import Origin, elsewhere

        if found := elsewhere((name,), Recipe, Origin(sets=((name, option),))):
            return found
    remedy = other_trainers.FLAGS.get(name, "").replace("COMMAND", command)
    return remedy if not remedy.startswith("write --") or remedy.removeprefix("write ") in has else ""
