"""`sftflow export`: files that run elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sftflow.cli.common import Model, app


@app.command()
def export(
    model: Model,
    to: Annotated[
        Literal["gguf", "merged", "nanochat"],
        typer.Option(
            "--to",
            help="gguf: a file for llama.cpp; merged: an adapter in its base; nanochat: a base directory of "
            "picollm and nanochat",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="the .gguf file, or the directory to be written")],
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, typer.Option("--type", help="how weights are stored; gguf: f16")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="merged: the base, where the adapter's is not at hand")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=70, help="gguf: prompts of the parity certificate")] = 50,
) -> None:
    """Write a GGUF file with its parity certificate, merge an adapter into its base, or write what picollm reads."""
    from sftflow.training.signals import Signals, Stopped

    try:
        with Signals():
            from sftflow import api
            from sftflow.api.publish import require_passed, summary

            certificate = api.export(model, to, out, type=kind, base=base, prompts=prompts)
            if to == "gguf":
                for line in summary(certificate):
                    print(line)
                print(f"certificate: {out.with_suffix('.parity.json')}")
                require_passed(certificate)
    except Stopped as stopped:
        print(f"stopped; {out} is as it was, or whole" + (" and not proven" if to == "gguf" else ""), file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None
