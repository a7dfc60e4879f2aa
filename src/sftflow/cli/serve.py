"""`sftflow serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from sftflow.cli.common import Model, app


@app.command()
def serve(
    model: Model,
    base_model: Annotated[str | None, typer.Option("--base", help="serve this one beside it")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8008,
    api_key: Annotated[str | None, typer.Option(help="ask clients for this key; else SFTFLOW_API_KEY")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="allow another host without a key")] = False,
    name: Annotated[str | None, typer.Option(help="what clients call the model by")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="a web origin that may call; *: any")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="another name that clients call it by")] = None,
    root_path: Annotated[str, typer.Option(help="below which path a proxy shows it, as /llm")] = "",
) -> None:
    """An OpenAI-compatible server and a chat page."""
    from sftflow import api

    api.serve(
        model,
        base_model,
        host=host,
        port=port,
        api_key=api_key,
        insecure=insecure,
        name=name,
        allow_origin=allow_origin or (),
        allow_hosts=allow_host or (),
        root_path=root_path,
    )
