"""The training stage: a recipe in, a run directory out.

recipe.yaml        fully resolved                  metrics.jsonl      a row a step
ledger.json        every row accounted for         validation.jsonl   held-out loss
mask_example.json  what is supervised of a row     evals.jsonl        samples of the tasks
held_out.jsonl     rows not trained on             resume/            the exact state, to go on from
training_rows.npz  all rows, by their digests      checkpoint/        the assistant

The listener writes log.txt beside them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sftflow.chat.template_options import options_note
from sftflow.chat.token_rows import token_row
from sftflow.checkpoint import (
    Assistant,
    assistant_of,
    load_tokenizer,
    prepare,
    require_own_names,
    resolve,
    save,
    save_adapter,
    stored_dtype,
)
from sftflow.data.decontaminate import EvalSets
from sftflow.data.mixture import write_bad_rows
from sftflow.data.rendered_once import rendered_once
from sftflow.data.run_rows import HELD_OUT, TRAINING_ROWS, write_run_rows
from sftflow.data.sources import pinned_recipe
from sftflow.fingerprint import weights_and_body_hash
from sftflow.foundation.atomic_io import NO_SPACE, Lock, digest_of, read_log, sweep, write_json, write_text
from sftflow.foundation.errors import CheckpointError, RunError
from sftflow.foundation.ranks import ranks, require_shared
from sftflow.foundation.runtime import detect
from sftflow.recipe import Recipe, to_yaml
from sftflow.training.batch_plan import RowPlan, StepLog
from sftflow.training.identity import asked_for, base_identity, run_identity, told_changes
from sftflow.training.loggers import open_logger
from sftflow.training.lora import attach, base_reference, not_plain, trainable_share, without_adapter
from sftflow.training.resume import (
    DONE,
    MEASURED_LATER,
    forget,
    missing_input,
    read_done,
    require_own_links,
    require_startable,
    warm_start,
)
from sftflow.training.run_log import RunLog
from sftflow.training.settings import check_context, decide_compile, resolve_recipe, set_dropout
from sftflow.training.signals import Signals, Stopped
from sftflow.training.trainer import Trainer, resting
from sftflow.training.training_run import Listener, TrainingRun, cannot_write

DESCRIBED = ("recipe.yaml", "ledger.json", "bad_rows.jsonl", "mask_example.json", HELD_OUT, TRAINING_ROWS)
LOGS = ("metrics.jsonl", "validation.jsonl", "evals.jsonl")

EvalCallback = Callable[[Assistant, Callable[[int, int], None]], dict[str, Any]]
"""Evaluates the live assistant in the middle of training, and tells how far it is (done, of how many); gives scores as
{"tasks": {NAME: score}, "hygiene": {RATE: share}} (see `EvalDuringTraining`)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. seconds: of this call, loading and rendering among them.   already_done: nothing was left."""

    directory: Path
    seconds: float
    already_done: bool = False

    @property
    def losses(self) -> list[float | None]:
        """Nats per supervised token of each step, None where it was not finite."""
        return [row["loss"] for row in read_log(self.directory / "metrics.jsonl")]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The held-out loss as it went: {"step", "loss", "supervised_tokens", "sources"}, in nats per supervised
        token."""
        return read_log(self.directory / "validation.jsonl")

    @property
    def train_seconds(self) -> float:
        """What all its steps took, those before a resume, too."""
        return float(sum(row["seconds"] for row in read_log(self.directory / "metrics.jsonl")))

    @property
    def kept(self) -> dict[str, Any]:
        """Which step the checkpoint is of: {"step", "of", "validation_loss", "chosen_by"}, as in the ledger."""
        return dict(json.loads((self.directory / "ledger.json").read_text(encoding="utf-8")).get("checkpoint", {}))


def run_training(
    recipe: Recipe,
    listener: Listener,
    *,
    resume: bool = False,
    overwrite: bool = False,
    signals: Signals | None = None,
    lock: Lock | None = None,
    callback: EvalCallback | None = None,
    eval_sets: EvalSets | None = None,
) -> Run:
    """Train as the recipe says, into `train.out`.

    With `resume`, go on from the newest saved state, bit for bit on the CPU; with none saved, start; on a run that is
    finished with the same recipe, say so. With `overwrite`, replace a run that is there, once the new one can start.
    Raises Stopped when SIGTERM or Ctrl-C comes, after saving once the steps have begun.

    signals, lock: the caller's, where they shall reach further than the training.   callback: what `eval.every` calls.
    eval_sets: whose rows `decontaminate: drop` leaves out.
    """
    started = time.perf_counter()
    out, here = Path(recipe.train.out), ranks()
    if out.exists() and not out.is_dir():
        raise CheckpointError(str(out), "train.out is a file", "name a folder")
    for name in (*DESCRIBED, *LOGS, *MEASURED_LATER, DONE, "log.txt"):
        if (out / name).is_dir():
            raise CheckpointError(
                str(out / name), "a folder is where the run writes a file", "move it, or change train.out"
            )
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(Signals())
        if lock is None and here.first:
            with signals.deferred():
                stack.enter_context(Lock(out))
        require_own_links(out)
        if here.first:
            sweep(out, *DESCRIBED, *LOGS, "resume", "checkpoint", DONE)
            sweep(out / "resume", "*")
        require_shared(out)
        done = read_done(out) if resume else None
        if done and done.get("asked") == asked_for(recipe) and (gone := missing_input(recipe)):
            listener.say(f"{out}: the finished run is compared with nothing: {gone} is no longer there")
            return Run(directory=out, seconds=0.0, already_done=True)
        if not done:
            with signals.deferred():  # it tries the folder, and what it makes there for that must go again
                require_startable(recipe, out, anew=not (overwrite or (resume and (out / "ledger.json").is_file())))
        try:
            tuning = FineTuning(recipe, listener, signals, callback, eval_sets)
            if done:
                tuning.require_same(done)
                return Run(directory=out, seconds=0.0, already_done=True)
            tuning.run(resume=resume, anew=overwrite)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise cannot_write(out, error) from error
    return Run(directory=out, seconds=time.perf_counter() - started)


class FineTuning(TrainingRun):
    """One fine-tuning: made from a recipe, then `run`. Nothing is written before that."""

    keeps_last_state = False
    memory_remedy = "lower train.micro_tokens or train.max_length"

    def __init__(
        self,
        recipe: Recipe,
        listener: Listener,
        signals: Signals,
        callback: EvalCallback | None,
        eval_sets: EvalSets | None,
    ) -> None:
        """Load the base, render the mixture, decide what the recipe leaves to `auto`."""
        location = resolve(recipe.base)
        listener.say(f"loading {recipe.base}")
        if location.adapter_of is not None:
            what = "a new adapter is" if recipe.train.lora else "all weights are"
            listener.say(f"the base is {location.adapter_of} with the adapter merged into it: {what} trained")
        self.base_path, out = Path(location.path), Path(recipe.train.out)
        if self.base_path.resolve().is_relative_to((out / "checkpoint").resolve()):
            raise CheckpointError(str(out), "the base itself is in it", "name another train.out")
        model, self.tokenizer, renderer, self.base_info = prepare(location, format_name=recipe.format)
        self.asked, self.dtype = asked_for(recipe), stored_dtype(location)
        runtime = detect(recipe.train.precision)
        recipe, self.notes = resolve_recipe(
            pinned_recipe(recipe),
            runtime,
            model.num_parameters(),
            self.base_info,
            location.nanochat.meta if location.nanochat else None,
        )
        check_context(model, recipe.train.max_length)
        set_dropout(model, recipe.train.dropout)
        weights, self.base_body = weights_and_body_hash(model)
        base = base_identity(model, self.dtype, weights)
        self.notes |= {"supervise": recipe.supervise, "turns": recipe.turns}
        self.adapter = None
        if recipe.train.lora:
            before = set(load_tokenizer(location).get_vocab().values())
            new = sorted(set(self.tokenizer.get_vocab().values()) - before)
            name, revision = base_reference(location)
            self.adapter = attach(model, recipe.train.lora, name, new, recipe.train.seed, revision)
            trained, of = trainable_share(model)
            self.notes["lora"] = f"{trained:,} of {of:,} parameters ({trained / of:.2%})"
            if experts := without_adapter(model, recipe.train.lora):
                listener.say(f"note: {experts:,} parameters of experts are no linear layers, and get no adapter")
        if ranks().world > 1 and recipe.train.shard == "full" and self.adapter is None:
            require_own_names(model)
        listener.say("rendering the mixture")
        self.mixture = rendered_once(recipe, renderer, listener.rendering, eval_sets)
        self.renderer = self.mixture.renderer
        for note in (*self.mixture.notes(), self.renderer.disagreement(), options_note(self.renderer)):
            if note:
                listener.say(note)
        plan = RowPlan(self.mixture.examples, recipe.train, listed=recipe.order == "listed")
        if unreached := plan.unreached():
            names = ", ".join(self.mixture.names[number] for number in unreached)
            listener.say(f"order: listed: the {plan.total_steps:,} steps end before they come to {names}")
        self.recipe, self.notes["compile"] = decide_compile(recipe, runtime, model.num_parameters(), plan.total_steps)
        if ranks().world == 1 or self.recipe.train.shard != "full":  # else the device gets its rows only
            model.to(runtime.device)
        super().__init__(
            out,
            Trainer(model, plan, self.recipe.train, runtime, self.mixture.names),
            listener,
            identity=run_identity(self.recipe, base, self.renderer, self.mixture.rows) | self.left_out(),
            signals=signals,
        )
        self.callback = callback
        self.validation, self.evals = RunLog(self.out / "validation.jsonl"), RunLog(self.out / "evals.jsonl")
        self.logs += [self.validation, self.evals]

    def left_out(self) -> dict[str, str]:
        """Which rows overlap with the evaluation tasks, by whose items a run is another one."""
        found = self.mixture.overlapping
        rows = digest_of(np.packbits(hit.any(axis=1)).tobytes() for hit in found)
        return {"rows that overlap with evaluation tasks": rows} if found else {}

    def require_same(self, done: dict[str, Any]) -> None:
        """Raises CheckpointError where the finished run (`read_done`) was of another recipe, base or data."""
        was, now = done["identity"], self.identity
        if done.get("asked") == self.asked:  # what such a recipe leaves to `auto` may be the choice of another machine
            was, now = ({k: v for k, v in side.items() if not k.startswith("recipe.")} for side in (was, now))
        if fact := told_changes(was, now, "the finished run in it is another"):
            raise CheckpointError(str(self.out), fact, "undo that, name another train.out, or give --overwrite")

    def run(self, *, resume: bool, anew: bool) -> None:
        """Train from the start, or with `resume` from the newest saved state, to the finished checkpoint; `anew`: in
        place of another run."""
        resumed = resume and self.restore()
        if self.recipe.train.warm_start and not resumed:
            self.listener.say(warm_start(self.base_path, self.trainer))
        here = self.trainer.ranks
        if here.first:
            self.describe(resumed)
            resumed_at = self.trainer.step if resume else None
            self.logger = open_logger(self.recipe, self.out, self.listener.say, resumed_at=resumed_at)
        facts = {"base": self.recipe.base, "held_out": len(self.mixture.held_out), "notes": self.notes}
        taught = {key: self.mixture.ledger.get(key) for key in ("supervised_tokens", "supervised_weight")}
        text = self.mixture.ledger.get("text", {}).get("supervised_tokens", 0)
        self.begin(anew=anew, supervised_text=text, **taught, **facts)
        if self.trainer.step == 0:
            self.validate()
        if here.from_first(self.evals.last_step()) != self.trainer.step:
            self.evaluate_sample()
        self.train()
        self.finish()

    def describe(self, resumed: bool) -> None:
        """Write what the run is made of; what was measured on an earlier training in this folder is not of this one."""
        for name in (DONE, *MEASURED_LATER):
            (self.out / name).unlink(missing_ok=True)
        if not resumed:
            forget(self.out / "resume")
            forget(self.out / "checkpoint")
        write_text(self.out / "recipe.yaml", to_yaml(self.recipe))
        self.write_ledger()
        write_bad_rows(self.out, self.mixture)
        shown = [token_row(rendered, self.tokenizer).to_json() for rendered in self.mixture.samples]
        write_json(self.out / "mask_example.json", shown)
        if not (resumed and all((self.out / name).is_file() for name in (HELD_OUT, TRAINING_ROWS))):
            write_run_rows(self.out, self.mixture, self.recipe)

    def after_step(self, log: StepLog) -> None:
        self.evaluate_sample()
        if self.is_due or self.is_last:
            loss = self.validate()
            better = loss is None or self.state.best is None or loss < self.state.best
            wanted = better or self.recipe.train.best == "last"
            finite = loss is None or math.isfinite(loss)
            # Where no validation loss was finite yet, weights that are finite are better than none.
            if wanted and (finite or self.state.best is None) and self.is_new(self.state.checkpoint or 0):
                self.state.best, self.state.checkpoint = loss if finite else None, self.trainer.step
                self.save_checkpoint()

    def validate(self) -> float | None:
        """Nats per supervised token of the held-out rows, logged; None where there are none."""
        if not self.mixture.held_out:
            return None
        step = self.trainer.step
        found = self.trainer.evaluate(self.mixture.held_out)
        loss, weight = found.loss, {} if found.weight is None else {"supervised_weight": found.weight}
        sources = dict(zip(self.mixture.names, found.by_source(), strict=True))
        row = {"step": step, "loss": loss, "supervised_tokens": found.supervised, **weight, "sources": sources}
        self.validation.append(row)
        self.validation.to_disk()
        self.listener.validation(step, loss, sources)
        self.logger.validation(step, loss, sources)
        return loss

    def evaluate_sample(self) -> None:
        """Every `eval.every` steps, a sample of each task on the live weights."""
        every = self.recipe.eval.every if self.recipe.eval else None
        if self.callback is None or every is None or self.trainer.step % every:
            return
        model, runtime = self.trainer.model, self.trainer.runtime
        live = assistant_of(model, self.tokenizer, self.renderer, runtime, tick=self.signals.check)
        try:
            with resting(model):
                found = self.callback(live, self.listener.evaluating)
        except Stopped:  # not to wait for minutes: the state is saved now, and the sample is taken when the run goes on
            return
        row = {"step": self.trainer.step, **found}
        self.evals.append(row)
        self.evals.to_disk()
        self.listener.evaluation(self.trainer.step, row)
        self.logger.evaluation(self.trainer.step, row)

    def save_checkpoint(self) -> None:
        known = {key: self.base_info.get(key) for key in ("fingerprint", "kind", "base")}
        name = self.recipe.base if self.adapter is None else self.adapter.peft_config["default"].base_model_name_or_path
        base = {"name": name, "body": self.base_body, **known}
        meta = {
            "version": version("sftflow"),
            "base": base,
            "recipe": self.recipe.model_dump(mode="json"),
            "notes": self.notes,
            "data": self.mixture.digest(),
            "step": self.trainer.step,
        }
        out, parts, here = self.out / "checkpoint", (self.tokenizer, self.renderer), self.trainer.ranks
        if self.adapter is None:
            save(out, self.trainer.model, *parts, dtype=self.dtype, meta=meta, ranks=here)
        elif here.first:
            save_adapter(out, self.adapter, *parts, dtype=self.dtype, meta=meta)
        here.barrier()
        self.write_ledger()

    def write_ledger(self) -> None:
        """What the run is made of, and of which step its checkpoint is."""
        kept = {
            "step": self.state.checkpoint,
            "of": self.trainer.plan.total_steps,
            "validation_loss": self.state.best,
            "chosen_by": self.recipe.train.best if self.mixture.held_out else "last",
        }
        if self.trainer.ranks.first:
            write_json(self.out / "ledger.json", {**self.mixture.ledger, "checkpoint": kept})

    def finish(self) -> None:
        if self.state.checkpoint is None:
            fact = "no step has changed the weights and left them finite"
            raise RunError(str(self.out), fact, self.divergence_remedy())
        if self.adapter is not None and (more := not_plain(self.adapter)):
            whole = f"for those: sftflow export {self.out} --to merged --out OUT"
            self.listener.say(f"vLLM or llama.cpp take no adapter with {' or '.join(more)}; {whole}")
        done = {"steps": self.trainer.plan.total_steps, "asked": self.asked, "identity": self.identity}
        if self.trainer.ranks.first:
            write_json(self.out / DONE, done)
        self.trainer.ranks.barrier()
        self.signals.check()

    def divergence_remedy(self) -> str:
        step = self.state.checkpoint
        there = f"{self.out / 'checkpoint'} holds those of step {step}"
        if self.mixture.held_out and self.state.best is None:
            there = "no validation loss was finite"
        held = "no checkpoint had been saved yet" if step is None else there
        return f"lower train.lr in a new train.out, or look at the rows of these steps; good weights: {held}"
