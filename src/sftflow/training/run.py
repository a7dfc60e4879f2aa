"""The training stage: a recipe in, a run directory out.

recipe.yaml        fully resolved                  metrics.jsonl      a row a step
ledger.json        every row accounted for         validation.jsonl   held-out loss
mask_example.json  what is supervised of a row     evals.jsonl        samples of the tasks
held_out.jsonl     rows not trained on             resume/            the exact state, to go on from
training_rows.npz  all rows, by their digests      checkpoint/        the assistant
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from sftflow.atomic_io import NO_SPACE, Lock, read_log, sweep
from sftflow.errors import CheckpointError
from sftflow.recipe import Recipe
from sftflow.training.fine_tuning import DONE, WRITTEN_HERE, EvalCallback, FineTuning
from sftflow.training.loggers import require_logger
from sftflow.training.resume import unfinished
from sftflow.training.signals import Signals
from sftflow.training.training_run import Listener, cannot_write


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. seconds: of this process, loading and rendering among them.   already_done: nothing was left."""

    directory: Path
    seconds: float
    already_done: bool = False

    @property
    def losses(self) -> list[float | None]:
        """Nats per supervised token of each step, None where it was not finite."""
        return [row["loss"] for row in read_log(self.directory / "metrics.jsonl")]


def run_training(
    recipe: Recipe,
    listener: Listener,
    *,
    resume: bool = False,
    signals: Signals | None = None,
    lock: Lock | None = None,
    callback: EvalCallback | None = None,
) -> Run:
    """Train as the recipe says, into `train.out`.

    With `resume`, go on from the newest saved state, bit for bit on the CPU; with none saved, start; on a finished
    run, say so. Raises Stopped when SIGTERM or Ctrl-C comes, after saving once the steps have begun.

    signals, lock: the caller's, where they shall reach further than the training.   callback: what `eval.every` calls.
    """
    started = time.perf_counter()
    out = Path(recipe.train.out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(str(out), "train.out is a file", "name a folder")
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(Signals())
        if lock is None:
            stack.enter_context(Lock(out))
        sweep(out, *WRITTEN_HERE)
        sweep(out / "resume", "*")
        done = (out / DONE).is_file()
        if done and resume:
            return Run(directory=out, seconds=0.0, already_done=True)
        if not done and not resume and (out / "resume").is_dir():
            raise unfinished(out)
        require_logger(recipe.train.logger)
        try:
            FineTuning(recipe, listener, signals, callback).run(resume=resume)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise cannot_write(out, error) from error
    return Run(directory=out, seconds=time.perf_counter() - started)
