"""`demo`, `base` and `train`: everything that makes a checkpoint."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sftflow.cli.common import Out, app, number, program, quiet
from sftflow.cli.measure import EvalOptions, compare_two, evaluate_all
from sftflow.errors import RecipeError


@app.command()
def demo(out: Out = Path("runs/demo")) -> None:
    """The whole flow on the shipped base: SFT, comparison, report."""
    from sftflow.atomic_io import Lock, clear_directory
    from sftflow.recipe import load_recipe

    path = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    recipe = load_recipe(path, [f"train.out={out}"])
    mark = out / ".demo"
    if out.exists() and any(out.iterdir()) and not mark.is_file():
        raise RecipeError(f"--out {out}", "it holds something else than a demo run", "name another folder")
    with Lock(out) as lock:
        clear_directory(out)
        mark.touch()  # this folder is the demo's: the next demo may replace it
        _train(recipe, resume=False, lock=lock)


@app.command()
def base(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help=".txt or .jsonl files, .xz too")],
    out: Out,
    params: Annotated[str, typer.Option(help="size: 0.1M, 1M, 3.4M or 6M")] = "3.4M",
    vocab: Annotated[int, typer.Option(min=300, help="vocabulary entries")] = 4096,
    tokens: Annotated[str, typer.Option(help="tokens to train on, for example 20M")] = "20M",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    heldout: Annotated[list[Path] | None, typer.Option(help="text to measure bits per byte on")] = None,
    lr: Annotated[float, typer.Option(help="AdamW's peak rate; Muon's is four times it")] = 7e-3,
    seed: Annotated[int, typer.Option()] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model (needs a C++ compiler)")] = False,
) -> None:
    """Train a tokenizer and a tiny base model on plain text."""
    quiet()
    from sftflow.atomic_io import Lock
    from sftflow.pretraining.pretrain import BaseSpec, train_base
    from sftflow.report.progress import ProgressDisplay
    from sftflow.runtime import detect

    spec = BaseSpec(params=params, vocab=vocab, tokens=number(tokens, "--tokens"), lr=lr, seed=seed, compile=compile)
    with ProgressDisplay() as watch, Lock(out):
        card = train_base(
            texts,
            out,
            spec,
            detect(),
            watch,
            resume=resume,
            heldout=heldout or (),
        )
        watch.say(f"{out / 'checkpoint'}: held-out bits per byte {json.dumps(card['bits_per_byte'])}")


def _train(recipe: Any, *, resume: bool, lock: Any = None) -> None:
    """Train, then evaluate and compare where the recipe asks for it. lock: on train.out, where it is held already."""
    from contextlib import ExitStack

    from sftflow.atomic_io import Lock
    from sftflow.training.signals import Signals, Stopped

    out = Path(recipe.train.out)
    with ExitStack() as stack:
        try:
            signals = stack.enter_context(Signals(_tell_of_waiting))
            if lock is None and (not out.exists() or out.is_dir()):
                lock = stack.enter_context(Lock(out))
            _train_and_measure(recipe, out, signals, lock, resume=resume)
        except Stopped as stopped:
            saved = any((out / "resume").glob("step-*"))
            if (out / "DONE").is_file():
                fact = "the training itself is finished; --resume goes on with what comes after it"
            elif stopped.saved:
                fact = f"the state is saved in {out / 'resume'}; --resume goes on"
            else:
                fact = f"{out / 'resume'} is as it was; --resume goes on" if saved else "nothing had been saved yet"
            print(f"stopped; {fact}", file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None


def _tell_of_waiting() -> None:
    """Called inside a signal handler, where nothing that buffers may be used."""
    os.write(2, b"\nstopping after this step, which is then saved; Ctrl-C again stops at once\n")


def _train_and_measure(recipe: Any, out: Path, signals: Any, lock: Any, *, resume: bool) -> None:
    quiet()
    from sftflow.report.progress import ProgressDisplay, stderr
    from sftflow.training.run import run_training

    callback = None
    asked = EvalOptions.of_recipe(recipe, out)
    if recipe.compare is not None:
        asked.compared_with().check()  # what is wrong with it is said before hours of training
    if recipe.eval is not None:
        asked.open(recipe.base)  # and what is wrong with the tasks
        if recipe.eval.every is not None:
            from sftflow.evaluation.callback import EvalDuringTraining

            callback = EvalDuringTraining(
                replace(asked, limit=min(asked.limit or recipe.eval.sample, recipe.eval.sample)).open("")
            )
    with ProgressDisplay() as watch:
        run = run_training(recipe, watch, resume=resume, signals=signals, lock=lock, callback=callback)
        if run.already_done:
            watch.say(f"{out}: this run is finished; nothing to resume")
            wanted = "compare.json" if recipe.compare else "eval.json" if recipe.eval else None
            if wanted is None or (out / wanted).is_file():
                return
        else:
            watch.say(f"{out / 'checkpoint'}: trained in {run.seconds:.0f} s")
        if recipe.eval is None and recipe.compare is None:
            return
        if recipe.compare is None:
            evaluate_all([str(out)], asked, watch)
            return
        compare_two(recipe.base, str(out), asked, watch)
        stderr().print(f"chat with it:  {program()} chat {out}", highlight=False, soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.steps=30")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last saved state")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="processes; this version trains in one")] = 1,
) -> None:
    """Fine-tune as the recipe says; evaluate and compare where it asks for it."""
    from sftflow.recipe import load_recipe

    if nproc != 1:
        raise RecipeError("--nproc", "this version trains in one process", "leave it out")
    _train(load_recipe(recipe, set_), resume=resume)
