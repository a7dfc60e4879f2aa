"""`sf.train`: from a base and a mixture to a run directory and its assistant."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.text import Text

from sftflow.api.assistant import Assistant, load
from sftflow.api.measure import Comparison, Evaluation, compare_two, evaluate_all
from sftflow.api.mixture import Mixture, renderer_of
from sftflow.api.shared import (
    Drawing,
    ModelLike,
    RecipeLike,
    eval_options,
    parts_of,
    recipe_of,
    recipe_tasks,
    sets_to_drop,
    watching,
)
from sftflow.chat.template_options import set_thinking
from sftflow.comparison.compare import checked_prompts
from sftflow.comparison.run_artifacts import read_run
from sftflow.evaluation.evaluate import EvalDuringTraining
from sftflow.foundation.atomic_io import Lock, clear_directory, write_text
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.errors import RecipeError
from sftflow.foundation.ranks import joined, ranks
from sftflow.foundation.runtime import detect
from sftflow.pretraining.pretrain import BaseSpec, train_base
from sftflow.recipe import Recipe, load_recipe, to_yaml
from sftflow.report.comparison_page import loss_cell
from sftflow.report.figures import duration
from sftflow.report.log_file import Heard
from sftflow.report.progress import ProgressDisplay
from sftflow.report.run_blocks import base_end_block, end_block
from sftflow.training import run as training_run
from sftflow.training.signals import Signals


@dataclass(frozen=True, kw_only=True)
class Run(training_run.Run):
    """A finished run: its directory, and what came out; prints as a summary.

    recipe: what was done, as one; `save_recipe` writes it.   evaluation, comparison: where the recipe asked for them.
    """

    recipe: Recipe
    evaluation: Evaluation | None = None
    comparison: Comparison | None = None

    @cached_property
    def assistant(self) -> Assistant:
        """The trained model, loaded when first used."""
        return load(self.directory)

    def plot(self) -> Drawing:
        """The loss of every step, smoothed, and the held-out losses."""
        return Drawing(loss_cell(read_run(self.directory)) or "no step has a loss that is a number")

    def save_recipe(self, path: str | Path) -> None:
        """Write what was done as a recipe, with which `sftflow train` trains the same weights."""
        write_text(Path(path), to_yaml(self.recipe))

    def ending(self) -> Text:
        """Which step was kept and why, the losses, the time, where all is, and what comes next."""
        return end_block(self.directory, self.recipe.base, self.recipe.eval, self.kept, self.seconds)

    def __str__(self) -> str:
        return self.ending().plain

    def __repr__(self) -> str:
        took = duration(self.train_seconds)
        return f"Run({str(self.directory)!r}, {len(self.losses)} steps, trained for {took})"


def train(
    base: ModelLike | None = None,
    mix: Mixture | None = None,
    *,
    recipe: RecipeLike | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **keys: Any,
) -> Run:
    """Fine-tune a base on a mixture; then evaluate and compare where the recipe has `eval` or `compare`.

    mix: from `sf.mix`.   recipe: in place of it.   out: the run directory.   resume: go on from the last saved state.
    overwrite: replace a run that is in `out`; else that is an error.
    keys: the recipe's, and those of its `train` by their own names: `steps=60`; or dotted: `mixture.0.limit`.
    Raises RecipeError, CheckpointError and their kin before anything is written, RunError where the run fails, and
    `training.signals.Stopped` after Ctrl-C, once the state is saved.
    """
    if resume and overwrite:
        raise RecipeError("--overwrite", "it starts anew, and --resume goes on", "give one of the two")
    if mix is not None and not isinstance(mix, Mixture):
        fact = f"it should be a mixture (given: {type(mix).__name__})"
        raise RecipeError("mix", fact, "give sftflow.mix(SOURCE), where SOURCE is rows, a file or a task")
    start = recipe if mix is None else mix.recipe
    made = recipe_of(start, base, (), {**keys, **({} if out is None else {"out": str(out)})})
    with watching() as shown:
        return _train(made, shown, resume=resume, overwrite=overwrite)


def demo(out: str | Path = "runs/demo") -> Run:
    """The whole flow on the shipped base. Raises RecipeError where `out` holds something other than an earlier demo."""
    folder = Path(out)
    recipe = load_recipe("builtin:demo", [f"train.out={folder}"])
    mark = folder / ".demo"
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise RecipeError(f"--out {folder}", "it holds something other than a demo run", "name another folder")
    with watching() as shown, ExitStack() as stack:
        with stack.enter_context(Signals()).deferred():  # cleared by half, it would not be known as a demo's any more
            lock = stack.enter_context(Lock(folder))
            clear_directory(folder)
            mark.touch()  # this folder is the demo's: the next demo may replace it
        return _train(recipe, shown, lock=lock)


def _train(
    recipe: Recipe, shown: ProgressDisplay, *, resume: bool = False, overwrite: bool = False, lock: Lock | None = None
) -> Run:
    """lock: on train.out, where it is held already."""
    started, out = time.perf_counter(), Path(recipe.train.out)
    with ExitStack() as stack, recipe.origin.named(), joined():
        stack.enter_context(Heard(shown.warned))
        signals = stack.enter_context(Signals(_tell_of_waiting))
        if lock is None and ranks().first and (not out.exists() or out.is_dir()):
            with signals.deferred():  # a lock half taken would stay behind
                lock = stack.enter_context(Lock(out))
        options, callback = eval_options(recipe), None
        if recipe.compare is not None:
            checked_prompts(recipe.compare)  # what is wrong with it is said before hours of training
        tasks = recipe_tasks(recipe)  # and what is wrong with the tasks
        if tasks and (on := tasks[0].how.thinking) is not None:
            set_thinking(renderer_of(recipe), on=on)
        if tasks and recipe.eval and recipe.eval.every is not None:
            few = min(options.limit or recipe.eval.sample, recipe.eval.sample)
            callback = EvalDuringTraining(replace(options, limit=few).open(""))
        run = training_run.run_training(
            recipe,
            shown,
            resume=resume,
            overwrite=overwrite,
            signals=signals,
            lock=lock,
            callback=callback,
            eval_sets=sets_to_drop(recipe),
        )
        measured = "compare.json" if recipe.compare else "eval.json" if recipe.eval else None
        evaluation = comparison = None
        if run.already_done:
            shown.say(f"{out}: this run is finished; nothing to resume")
        if measured and not (run.already_done and (out / measured).is_file()):
            shown.log.open(out, anew=False)
            if recipe.compare is None:
                evaluation = evaluate_all([str(out)], options, out, shown)
            else:
                comparison = compare_two(recipe.base, str(out), options, recipe.compare, out, shown)
        whole = parts_of(run) | {"seconds": time.perf_counter() - started}
        found = Run(**whole, recipe=_kept_recipe(out), evaluation=evaluation, comparison=comparison)
        for said in (evaluation, comparison, *(comparison.remarks() if comparison else ()), found):
            shown.log.write(str(said or ""))
    return found


def _kept_recipe(out: Path) -> Recipe:
    """The resolved recipe. Rows that came from memory are copied into the run, so that it can be trained again."""
    recipe, memory = load_recipe(out / "recipe.yaml"), cache_folder("memory")
    entries = list(recipe.mixture)
    for number, entry in enumerate(entries):
        file = Path(entry.source)
        if memory is not None and memory in file.parents and file.is_file():
            kept = out.resolve() / "rows" / str(number + 1) / file.name  # it is called by its name
            write_text(kept, file.read_text(encoding="utf-8"))
            entries[number] = entry.model_copy(update={"source": str(kept)})
    return recipe.model_copy(update={"mixture": tuple(entries)})


def _tell_of_waiting() -> None:
    """Called inside a signal handler, where nothing that buffers may be used."""
    if ranks().first:
        os.write(2, b"\nstopping after this step, which is then saved; Ctrl-C again stops at once\n")


def pretrain(texts: Sequence[str | Path], out: str | Path, **keys: Any) -> dict[str, Any]:
    """Train a tokenizer and a tiny base on plain text into `out`; returns the facts of its model card.

    keys: the fields of `BaseSpec` (params, vocab, tokens, lr, seed, compile), `heldout` and `resume`.
    """
    started = time.perf_counter()
    heldout, resume = keys.pop("heldout", ()), keys.pop("resume", False)
    with watching() as shown, Lock(Path(out)):
        card = train_base(
            [Path(t) for t in texts],
            Path(out),
            BaseSpec(**keys),
            detect(),
            shown,
            resume=resume,
            heldout=[Path(t) for t in heldout],
        )
        shown.say(base_end_block(Path(out), card["bits_per_byte"], time.perf_counter() - started))
    return card
