"""What a run tells TensorBoard, Weights & Biases or Trackio: `train.logger`, one word of the recipe.

    require_logger   the package is there, else a refusal before any work
    open_logger      a Logger: step, validation, evaluation; without a logger in the recipe they do nothing

Packages are imported only when asked for. A logger that fails says so once, and the training goes on without it:
metrics.jsonl and validation.jsonl hold the same numbers anyway. Everything is written inside train.out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sftflow.foundation.errors import RecipeError, first_line
from sftflow.recipe import Recipe, to_yaml
from sftflow.training.run_log import RunLog

PROJECT = "sftflow"
FINISH_SECONDS = 60.0  # a network that is down must not keep a finished run from ending


class Sink(NamedTuple):
    """One service's own writer. log: (values, step).   close: (whether the run failed)."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[bool], object]


def tensorboard(recipe: Recipe, out: Path, resumed_at: int | None) -> Sink:
    """Events in train.out/tensorboard; `tensorboard --logdir` shows them.

    A resumed run purges what the killed one wrote after the saved step, and writes it again.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    if resumed_at is None:
        # As metrics.jsonl: a run that starts anew in a used folder does not mix with the one before.
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    # The validation loss of step 0 is written again only when the run starts there again.
    purge = None if resumed_at is None else resumed_at + 1 if resumed_at else 0
    writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
    if not resumed_at:
        writer.add_text("recipe", "```yaml\n" + to_yaml(recipe) + "```", 0)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(log, lambda failed: writer.close())


def wandb(recipe: Recipe, out: Path, resumed_at: int | None) -> Sink:
    """A run in train.out/wandb, under the same id when resumed. WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY count."""
    # Its own debug logs would go to the home directory.
    os.environ.setdefault("WANDB_CACHE_DIR", str(out.resolve() / "wandb" / "cache"))
    import wandb

    settings = wandb.Settings(
        console="off",  # it would wrap the very streams that the progress is shown on
        disable_code=True,  # the recipe says what was run; the user's code and repository stay at home
        disable_git=True,
        finish_timeout=FINISH_SECONDS,
        quiet=True,  # no charts of characters at the end
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=out.resolve().name,
        id=run_name(out / "wandb", resumed_at is not None),
        # Offline there is no server to ask; the id alone joins the parts when they are synced.
        resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
        dir=str(out),
        config=recipe.model_dump(mode="json"),
        settings=settings,
    )
    return Sink(run.log, lambda failed: run.finish(exit_code=int(failed)))


def trackio(recipe: Recipe, out: Path, resumed_at: int | None) -> Sink:
    """A project in train.out/trackio (or TRACKIO_DIR); TRACKIO_PROJECT and TRACKIO_SPACE_ID count."""
    folder = out.resolve() / "trackio"
    name = run_name(folder, resumed_at is not None)
    os.environ.setdefault("TRACKIO_DIR", str(folder))  # read once, when trackio is imported
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{out.resolve().name}-{name}",
        config=recipe.model_dump(mode="json"),
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    # The run's own finish would be called a second time when the process ends.
    return Sink(run.log, lambda failed: trackio.finish())


# A recipe word, which is the name of the package it needs -> (its writer, whether what was logged can be taken back).
LOGGERS: dict[str, tuple[Callable[[Recipe, Path, int | None], Sink], bool]] = {
    "tensorboard": (tensorboard, True),
    "wandb": (wandb, False),
    "trackio": (trackio, False),
}


def require_logger(name: str | None) -> None:
    """Raises RecipeError where the recipe asks for a logger whose package is not installed."""
    if name is None:
        return
    found = importlib.util.find_spec(name)
    # A mere folder of that name (./wandb, as wandb itself leaves behind) is found too, but has no origin.
    if found is None or found.origin is None:
        raise RecipeError(
            "train.logger", f"{name} is not installed", f"pip install 'sftflow[{name}]', or set train.logger to null"
        )


class Logger(contextlib.AbstractContextManager["Logger"]):
    """Sends each step once, and survives its service.

    sink: None where the recipe asks for no logger, or once it has failed.
    seen: the last step and the last validation that an earlier part of this run has sent and cannot take back.
    """

    def __init__(self, name: str | None, say: Callable[[str], None], seen: tuple[int, int] = (0, -1)) -> None:
        self.name, self.say = name, say
        self.seen_step, self.seen_validation = seen
        self.sink: Sink | None = None

    def attempt(self, act: Callable[[], Any]) -> Any:
        """Do it, or say once why not and go on without the logger."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # these packages greet on stdout, which is for results
                return act()
        except Exception as error:
            self.sink = None
            fact = first_line(error)[:200] or "no reason given"
            self.say(f"{self.name}: {type(error).__name__}: {fact}; training goes on without it")
            return None

    def _send(self, values: Mapping[str, float | None], step: int) -> None:
        sink = self.sink
        if sink is not None:
            # A skipped step has a loss that is no number, which no chart can show.
            finite = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
            self.attempt(lambda: sink.log(finite, step))

    def step(self, log: Any) -> None:
        """log: a StepLog."""
        if log.step <= self.seen_step:
            return
        seconds = max(1e-9, log.seconds)
        values = {
            "train/loss": log.loss,
            "train/lr": log.lr,
            "train/grad_norm": log.grad_norm,
            "train/tokens_per_second": log.tokens / seconds,
            "train/supervised_tokens_per_second": log.supervised_tokens / seconds,
            "train/padding_share": log.padding_share,
            "train/skipped": float(log.skipped),
        }
        self._send(values | {f"train_loss/{name}": loss for name, loss in log.source_loss.items()}, log.step)

    def validation(self, step: int, loss: float, sources: Mapping[str, float | None]) -> None:
        if step > self.seen_validation:
            by_source = {f"validation_loss/{name}": value for name, value in sources.items()}
            self._send({"validation/loss": loss} | by_source, step)

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """figures: {"tasks": {NAME: score}, "hygiene": {RATE: share}}"""
        if step > self.seen_validation:
            values = {f"eval/{name}": score for name, score in figures["tasks"].items()}
            self._send(values | {f"hygiene/{name}": share for name, share in figures["hygiene"].items()}, step)

    def __exit__(self, kind: Any, *_: Any) -> None:
        sink, self.sink = self.sink, None
        if sink is not None:
            self.attempt(lambda: sink.close(kind is not None))


def open_logger(recipe: Recipe, out: Path, say: Callable[[str], None], *, resumed_at: int | None) -> Logger:
    """The logger that the recipe (resolved) asks for.

    resumed_at: the step that --resume goes on from; None for a run that starts anew. To be called before the
    run's own logs are cut back to that step: they tell what the killed run had sent.
    """
    name = recipe.train.logger
    if name is None:
        return Logger(None, say)
    start, can_take_back = LOGGERS[name]
    seen = (0, -1)
    if resumed_at is not None and not can_take_back and (out / name / RUN_NAME).is_file():
        seen = (RunLog(out / "metrics.jsonl").last_step(0), RunLog(out / "validation.jsonl").last_step())
    logger = Logger(name, say, seen)
    (out / name).mkdir(parents=True, exist_ok=True)
    logger.sink = logger.attempt(lambda: start(recipe, out, resumed_at))
    return logger


RUN_NAME = "run-id"


def run_name(folder: Path, resumed: bool) -> str:
    """The id under which a service knows this run: kept in its folder, new for a run that starts anew."""
    file = folder / RUN_NAME
    if resumed and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    folder.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(4)
    file.write_text(name + "\n", encoding="utf-8")
    return name
