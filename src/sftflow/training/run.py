"""The training stage: recipe -> mixture -> loop -> a run directory.

recipe.yaml   fully resolved          metrics.jsonl   a row a step      validation.jsonl   held-out loss
ledger.json   every row accounted     resume/         exact state       checkpoint/        the assistant
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sftflow import __version__
from sftflow.atomic_io import NO_SPACE, Lock, finite, reason, sweep, write_json, write_text
from sftflow.chat.template_options import settled
from sftflow.chat.token_rows import token_row
from sftflow.checkpoint import prepare, require_finite_weights, resolve, save
from sftflow.data.mixture import build_mixture, write_bad_rows
from sftflow.errors import CheckpointError, RunError
from sftflow.fingerprint import run_identity
from sftflow.recipe import Recipe, to_yaml
from sftflow.runtime import Runtime, detect, out_of_memory, peak_memory
from sftflow.training.loggers import open_logger, require_logger
from sftflow.training.settings import loop_spec, resolve_recipe, set_dropout, settle_compile, stored_dtype
from sftflow.training.signals import Signals, Stopped

WRITTEN_HERE = (
    "resume",
    "checkpoint",
    "recipe.yaml",
    "ledger.json",
    "bad_rows.jsonl",
    "mask_example.json",
    "metrics.jsonl",
    "validation.jsonl",
    "evals.jsonl",
    "DONE",
)
MEASURED = ("eval.json", "compare.json", "report.html")
"""what is measured after the training: those of an earlier training in the same folder are not this one's"""


class Listener(Protocol):
    """What a run tells the person watching it."""

    def say(self, text: str) -> None: ...

    def rendering(self, source: str, rows: int) -> None: ...

    def step(self, log: Any, total: int) -> None: ...

    def validation(self, step: int, loss: float, sources: Mapping[str, float | None]) -> None: ...

    def machine(self, runtime: Runtime) -> None: ...

    def evaluating(self, done: int, total: int) -> None: ...

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None: ...


class EvalCallback(Protocol):
    """Evaluates the live model in the middle of training; see `evals.during`."""

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: Any,
        runtime: Runtime,
        progress: Callable[[int, int], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    directory: Path
    seconds: float
    already_done: bool = False


def run_training(
    recipe: Recipe,
    listener: Listener,
    *,
    resume: bool = False,
    signals: Signals | None = None,
    lock: Lock | None = None,
    sampling: EvalCallback | None = None,
) -> Run:
    """Train as the recipe says, into `train.out`.

    With `resume`, go on from the newest saved state, bit for bit on the CPU; with none saved, start; on a finished
    run, say so. Raises Stopped when SIGTERM or Ctrl-C comes, after saving once the steps have begun.

    signals, lock: the caller's, where they shall reach further than the training.   sampling: what `eval.every` calls.
    """
    out = Path(recipe.train.out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(str(out), "train.out is a file", "name a folder")
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(Signals())
        if lock is None:
            stack.enter_context(Lock(out))
        sweep(out, *WRITTEN_HERE)
        sweep(out / "resume", "*")
        try:
            return _train(recipe, listener, out, signals, sampling, resume=resume)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise _cannot_write(out, error) from error


def _train(
    recipe: Recipe, listener: Listener, out: Path, signals: Signals, sampling: EvalCallback | None, *, resume: bool
) -> Run:
    """`run_training` in a folder that is ours."""
    from safetensors import SafetensorError

    from sftflow.training.batch_plan import RowPlan
    from sftflow.training.resume import (
        flush_to_disk,
        forget_states,
        last_logged,
        load_state,
        save_state,
        saved_states,
        truncate_log,
    )
    from sftflow.training.trainer import Trainer
    from sftflow.training.warm_start import warm_start

    started = time.perf_counter()
    if (out / "DONE").is_file() and resume:
        return Run(directory=out, seconds=0.0, already_done=True)
    if not resume and (out / "resume").is_dir() and not (out / "DONE").is_file():
        raise CheckpointError(str(out), "an unfinished run is in it", "continue it with --resume, or remove the folder")
    require_logger(recipe.train.logger)
    location = resolve(recipe.base)
    listener.say(f"loading {recipe.base}")
    model, tokenizer, renderer, base_info = prepare(location, format_name=recipe.format)
    require_finite_weights(model, recipe.base, "give another base, or copy this one again")
    runtime = detect(recipe.train.precision)
    base_dtype = stored_dtype(location)
    recipe, notes = resolve_recipe(recipe, runtime, model.num_parameters())
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    if context and recipe.train.max_length > context:
        raise CheckpointError(
            "train.max_length", f"{recipe.train.max_length} is more than the base's context of {context}", "lower it"
        )
    set_dropout(model, recipe.train.dropout)
    listener.say("rendering the mixture")
    mixture = build_mixture(recipe, renderer, listener.rendering)
    renderer = mixture.renderer
    for note in (renderer.disagreement(), settled(renderer)):
        if note:
            listener.say(note)
    ledger = mixture.ledger()
    plan = RowPlan(mixture.examples, loop_spec(recipe))
    recipe, notes["compile"] = settle_compile(recipe, runtime, model.num_parameters(), plan.total_steps)
    spec = loop_spec(recipe)
    model.to(runtime.device)
    trainer = Trainer(model, plan, spec, runtime, mixture.names)
    identity = run_identity(recipe, tokenizer, renderer.format, mixture.rows)
    states = saved_states(out / "resume")
    extra: dict[str, Any] = {"best": None, "checkpoint": None, "seconds": 0.0}
    if resume and states:
        extra = load_state(states[-1], trainer, identity)
        listener.say(f"resumed at step {trainer.step} of {plan.total_steps}")
    else:
        if recipe.train.warm_start:
            listener.say(warm_start(Path(location.path), trainer))
        forget_states(out / "resume")
    for name in ("DONE", *MEASURED):
        (out / name).unlink(missing_ok=True)
    write_text(out / "recipe.yaml", to_yaml(recipe))
    write_json(out / "ledger.json", ledger)
    write_bad_rows(out, mixture)
    write_json(out / "mask_example.json", [token_row(r, tokenizer).to_json() for r in mixture.samples])

    meta = {
        "version": __version__,
        "base": {"name": recipe.base, "fingerprint": base_info.get("fingerprint"), "kind": base_info.get("kind")},
        "recipe": recipe.model_dump(mode="json"),
        "notes": notes,
        "data": ledger["data_sha256"],
    }

    def save_checkpoint() -> None:
        save(out / "checkpoint", model, tokenizer, renderer, dtype=base_dtype, meta={**meta, "step": trainer.step})

    def validate() -> float | None:
        if not mixture.held_out:
            return None
        loss, by_source, n = trainer.evaluate(mixture.held_out)
        row = {
            "step": trainer.step,
            "loss": loss,
            "supervised_tokens": n,
            "sources": dict(zip(mixture.names, by_source, strict=True)),
        }
        with (out / "validation.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(finite(row), allow_nan=False) + "\n")
            flush_to_disk(f)
        listener.validation(trainer.step, loss, row["sources"])
        logger.validation(trainer.step, loss, row["sources"])
        return loss

    every = recipe.eval.every if recipe.eval and sampling is not None else None

    def sample() -> None:
        if sampling is None or every is None or trainer.step % every:
            return
        try:
            found = sampling(model, tokenizer, renderer, runtime, listener.evaluating, signals.check)
        except Stopped:  # not to wait for minutes: the state is saved now, and the sample is taken when the run goes on
            return
        row = {"step": trainer.step, **found}
        with (out / "evals.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            flush_to_disk(f)
        listener.evaluation(trainer.step, row)
        logger.evaluation(trainer.step, row)

    logger = open_logger(recipe, out, listener.say, resumed_at=trainer.step if resume else None)
    listener.machine(runtime)
    truncate_log(out / "metrics.jsonl", trainer.step)
    truncate_log(out / "validation.jsonl", trainer.step if trainer.step else -1)
    truncate_log(out / "evals.jsonl", trainer.step if trainer.step else -1)
    if trainer.step == 0:
        validate()
    if last_logged(out / "evals.jsonl") != trainer.step:
        sample()
    try:
        with signals.between_steps(), logger, (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            for log in trainer:
                extra["seconds"] += log.seconds
                row = finite(asdict(log) | {"memory": peak_memory(runtime.device)})  # NaN is not JSON
                metrics.write(json.dumps(row, allow_nan=False) + "\n")
                metrics.flush()
                logger.step(log)
                listener.step(log, plan.total_steps)
                sample()
                done = trainer.step == plan.total_steps
                due = trainer.step % recipe.train.save_every == 0
                if due or done:
                    loss = validate()
                    better = loss is None or extra["best"] is None or loss < extra["best"]
                    sound = math.isfinite(log.loss if loss is None else loss)
                    if sound and (better or recipe.train.best == "last"):
                        extra.update(best=loss, checkpoint=trainer.step)
                        save_checkpoint()
                # A step that was not finite is none to go back to, unless we are told to stop there.
                if not done and (signals.asked or (due and not log.skipped)):
                    flush_to_disk(metrics)
                    save_state(out / "resume", trainer, identity, extra, recipe.train.keep)
                if signals.asked and not done:
                    raise Stopped(signals.asked, saved=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(out, error) from error
    except RunError as error:
        raise RunError(error.place, error.fact, _after_divergence(out, extra)) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError("training", "out of memory", "lower train.micro_tokens or train.max_length") from error
    if extra.get("checkpoint") is None:
        raise RunError(str(out), "the loss was never finite where a checkpoint was due", _after_divergence(out, extra))
    write_text(out / "DONE", f"{plan.total_steps} steps\n")
    signals.check()
    return Run(directory=out, seconds=time.perf_counter() - started)


def _cannot_write(out: Path, error: Exception) -> RunError:
    why = reason(error)
    full = why in {os.strerror(number) for number in NO_SPACE}
    remedy = "free space" if full else "check the disk and its permissions"
    return RunError(str(out), f"cannot write ({why})", f"{remedy}; --resume goes on")


def _after_divergence(out: Path, extra: dict[str, Any]) -> str:
    """What can be done after a run whose loss is not finite."""
    step = extra.get("checkpoint")
    held = "no checkpoint had been saved yet" if step is None else f"{out / 'checkpoint'} holds those of step {step}"
    return f"lower train.lr in a new train.out, or look at the rows of these steps; good weights: {held}"
