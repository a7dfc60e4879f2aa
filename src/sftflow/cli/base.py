"""`sftflow base`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftflow.cli.common import Out, app, number


@app.command()
def base(
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXT...", help="text files, or JSON lines with `text`; also packed with xz")
    ],
    out: Out,
    params: Annotated[str, typer.Option(help="size: 0.1M, 1M, 3.4M or 6M")] = "3.4M",
    vocab: Annotated[int, typer.Option(min=300, help="vocabulary entries")] = 4096,
    tokens: Annotated[str, typer.Option(help="tokens to train on, for example 20M")] = "20M",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    heldout: Annotated[
        list[Path] | None, typer.Option(help="files of the same kinds, to measure bits per byte on")
    ] = None,
    lr: Annotated[float, typer.Option(help="AdamW's peak rate; Muon's is four times it")] = 7e-3,
    seed: Annotated[int, typer.Option()] = 0,
    start: Annotated[str, typer.Option(help="a base to train further, whose shape and tokenizer are kept")] = "",
    skip: Annotated[str | None, typer.Option(help="tokens at the text's start that --start has seen")] = None,
    against_loops: Annotated[bool, typer.Option("--against-loops", help="do not teach to repeat")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model (needs a C++ compiler)")] = False,
) -> None:
    """Train a tokenizer and a tiny base model on plain text."""
    from sftflow import api

    api.pretrain(
        texts,
        out,
        heldout=heldout or (),
        resume=resume,
        params=params,
        vocab=vocab,
        tokens=number(tokens, "--tokens"),
        lr=lr,
        seed=seed,
        start=start,
        skip=number(skip, "--skip") if skip else 0,
        against_loops=against_loops,
        compile=compile,
    )
