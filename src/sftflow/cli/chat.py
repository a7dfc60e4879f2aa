"""`sftflow chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from sftflow.cli.common import Model, app


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="ask once and print the reply")] = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    base_model: Annotated[str | None, typer.Option("--base", help="what /base asks; else the one trained from")] = None,
) -> None:
    """Talk to a model in the terminal."""
    from sftflow import api

    api.talk(model, prompt=prompt, system=system, base=base_model)
