"""`export`: files that run elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sftflow.cli.common import Model, app, quiet


@app.command()
def export(
    model: Model,
    to: Annotated[
        Literal["gguf", "merged"],
        typer.Option("--to", help="gguf: a file for llama.cpp; merged: an adapter in its base"),
    ],
    out: Annotated[Path, typer.Option("--out", help="the .gguf file, or the directory of the merged checkpoint")],
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, typer.Option("--type", help="how weights are stored; gguf: f16")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="merged: the base, where the adapter's is not at hand")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=70, help="gguf: prompts of the parity certificate")] = 50,
) -> None:
    """Write a GGUF file with its parity certificate, or merge a LoRA adapter into its base."""
    from sftflow.training.signals import Signals, Stopped

    try:
        with Signals():
            _export(model, to, out, kind, base, prompts)
    except Stopped as stopped:
        print(f"stopped; {out} is as it was, or whole" + (" and not proven" if to == "gguf" else ""), file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def _export(model: str, to: str, out: Path, kind: str | None, base: str | None, prompts: int) -> None:
    quiet()
    from sftflow.errors import ProofError, RecipeError
    from sftflow.report.progress import stderr

    def say(text: str) -> None:
        stderr().print(text, highlight=False, markup=False)

    if to == "merged":
        from sftflow.exporting.merge import merge

        if kind == "q8_0":
            raise RecipeError("--type", "a checkpoint directory holds no q8_0", "use f32, f16 or bf16")
        merge(model, out, base=base, kind=kind)
        say(f"export: wrote {out}; it loads like any checkpoint: sftflow chat {out}")
        return
    if base is not None:
        raise RecipeError("--base", "only --to merged has one", "leave it out")
    from sftflow.exporting.to_gguf import export_gguf, summary

    found = export_gguf(model, out, kind or "f16", prompts=prompts, say=say)
    for line in summary(found):
        print(line)
    print(f"certificate: {out.with_suffix('.parity.json')}")
    if found["passed"] is False:
        first = found["failures"][0]
        raise ProofError(f"prompt {first['prompt']}", f"{first['check']}: {first['detail']}", "do not trust this file")
