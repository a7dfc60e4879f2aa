"""`sftflow chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from sftflow.cli.common import Model, app


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, Option(help="ask once and print the reply")] = None,
    system: Annotated[str | None, Option(help="a system message")] = None,
    base_model: Annotated[str | None, Option("--base", help="what /base asks; else the one trained from")] = None,
    temperature: Annotated[float | None, Option(min=0, max=2, help="0: the likeliest token")] = None,
    top_p: Annotated[float | None, Option(min=0, max=1, help="draw from the likeliest share")] = None,
    seed: Annotated[int | None, Option(min=-(2**63), max=2**63 - 1, help="of a reply; /retry takes the next")] = None,
    max_tokens: Annotated[int | None, Option(min=1, help="of a reply; else 1,024")] = None,
) -> None:
    """Talk to a model in the terminal. How tokens are drawn is the checkpoint's own choice where nothing is said."""
    from sftflow import api

    drawn = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    api.talk(model, prompt=prompt, system=system, base=base_model, **drawn)
