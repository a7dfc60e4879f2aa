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
    allow_origin: Annotated[str | None, typer.Option(help="one web origin that may call")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="another name that clients call it by")] = None,
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
        allow_origin=allow_origin,
        allow_hosts=allow_host or (),
    )
