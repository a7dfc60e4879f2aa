"""`serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Model, app, quiet


@app.command()
def serve(
    model: Model,
    base_model: Annotated[str | None, typer.Option("--base", help="serve this one beside it")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8008,
    api_key: Annotated[str | None, typer.Option(help="ask clients for this key; else SFTFLOW_API_KEY")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="allow another host without a key")] = False,
    allow_origin: Annotated[str | None, typer.Option(help="one web origin that may call")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="another name that clients call it by")] = None,
) -> None:
    """An OpenAI-compatible server and a chat page."""
    quiet()
    from sftflow.checkpoint import Assistant, base_format, load_assistant
    from sftflow.report.progress import stderr
    from sftflow.serving.api import serve as run

    def load() -> dict[str, Assistant]:
        assistants = {_model_id(model): load_assistant(model)}
        if base_model:
            (sft,), name = assistants.values(), _model_id(base_model)
            name = name if name not in assistants else f"{name}-base"
            assistants[name] = load_assistant(base_model, fallback=base_format(sft))
        return assistants

    run(
        load,
        host=host,
        port=port,
        # typer would take an empty variable for one that is not set
        api_key=os.environ.get("SFTFLOW_API_KEY") if api_key is None else api_key,
        allow_origin=allow_origin,
        allow_hosts=allow_host or (),
        insecure=insecure,
        say=lambda text: stderr().print(text, highlight=False, markup=False),
    )


def _model_id(name: str) -> str:
    """What clients call a model by: the directory's name, or the hub id as it is.

    >>> _model_id("HuggingFaceTB/SmolLM2-135M"), _model_id("builtin:tiny")
    ('HuggingFaceTB/SmolLM2-135M', 'builtin:tiny')
    """
    if not Path(name).exists():
        return name
    path = Path(name).resolve()
    return path.parent.name if path.name == "checkpoint" else path.name
