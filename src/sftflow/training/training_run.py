"""A training in its run directory: what pretraining and fine-tuning have in common.

metrics.jsonl    a row a step
resume/step-N/   the newest states, to go on from
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from sftflow.checkpoint.weights import not_finite
from sftflow.foundation.atomic_io import NO_SPACE, reason
from sftflow.foundation.errors import RunError
from sftflow.foundation.runtime import KeptMemory, Runtime, out_of_memory, peak_memory
from sftflow.training.batch_plan import StepLog
from sftflow.training.identity import Identity
from sftflow.training.loggers import Logger
from sftflow.training.opening import Opening, opening_of
from sftflow.training.resume import load_state, save_state, saved_states
from sftflow.training.run_log import RunLog
from sftflow.training.signals import Signals, Stopped
from sftflow.training.trainer import Trainer


class Listener(Protocol):
    """What a run tells the person watching it; a subclass may listen to some of it only."""

    def say(self, text: str) -> None: ...

    def rendering(self, source: str, rows: int) -> None: ...

    def step(self, log: StepLog, total: int) -> None: ...

    def validation(self, step: int, loss: float, sources: Mapping[str, float | None]) -> None: ...

    def machine(self, runtime: Runtime) -> None: ...

    def begins(self, run: Opening) -> None: ...

    def evaluating(self, done: int, total: int) -> None: ...

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None: ...


@dataclass
class RunState:
    """What a run remembers beside its weights and optimizer, saved with them.

    seconds: of all steps so far, those before a resume too.   checkpoint: the step of the checkpoint that is there,
    None where there is none.   best: its validation loss.
    """

    best: float | None = None
    checkpoint: int | None = None
    seconds: float = 0.0


class TrainingRun:
    """`restore` where a run shall go on, then `begin` and `train`. A stage adds what it does between two steps.

    identity: what must be the same for a saved state to be taken up again, key by key.
    signals: the caller's; they are only noted while a step runs.
    """

    keeps_last_state = True
    """whether the state after the last step is saved, too"""
    memory_remedy = "close other programs, or train a smaller model"

    def __init__(
        self,
        out: Path,
        trainer: Trainer,
        listener: Listener,
        *,
        identity: Identity,
        signals: Signals | None = None,
    ) -> None:
        self.out, self.trainer, self.listener, self.identity = out, trainer, listener, identity
        self.signals = signals or Signals()
        self.state = RunState()
        self.saved = 0  # the step of the newest saved state
        self.metrics = RunLog(out / "metrics.jsonl")
        self.logs = [self.metrics]
        self.logger = Logger(None, listener.say)

    def restore(self) -> bool:
        """Go on from the newest saved state, on a CPU bit for bit; False where there is none."""
        states = self.trainer.ranks.from_first(saved_states(self.out / "resume"))
        if not states:
            return False
        self.state = RunState(**load_state(states[-1], self.trainer, self.identity))
        self.saved = self.trainer.step
        return True

    def begin(self, **facts: Any) -> None:
        """Before the first step of this process: what a killed run logged after its saved state is logged again.

        facts: see `opening_of`.
        """
        self.listener.machine(self.trainer.runtime)
        for log in self.logs:
            log.cut_back(self.trainer.step or -1)
        self.listener.begins(opening_of(self.trainer, self.out, facts))

    def train(self) -> None:
        """Train to the last step.

        Raises Stopped after the step during which a signal came, with its state saved, and RunError where the disk or
        the memory is full, or the loss is not finite.
        """
        kept = KeptMemory()
        try:
            with self.signals.between_steps(), self.logger:
                for log in self.trainer:
                    kept.after_step()
                    self.state.seconds += log.seconds
                    self.metrics.append(log.to_json() | {"memory": peak_memory(self.trainer.runtime.device)})
                    self.logger.step(log)
                    self.listener.step(log, self.trainer.plan.total_steps)
                    self.trainer.require_finite(log)
                    self.after_step(log)
                    self.save_if_due()
        except (OSError, SafetensorError) as error:
            raise cannot_write(self.out, error) from error
        except RunError as error:
            raise RunError(error.place, error.fact, self.divergence_remedy()) from error
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunError("training", "out of memory", self.memory_remedy) from error

    def after_step(self, log: StepLog) -> None:
        """What a stage does after each step, before the state is saved."""

    def save_if_due(self) -> None:
        """Save the state each `save_every` steps, and where a signal has come; Raises Stopped then."""
        asked = max(self.trainer.ranks.gather(self.signals.asked))  # a signal that came to one rank stops them all
        if self.is_last and self.keeps_last_state and not self.is_new(0):
            raise RunError(f"step {self.trainer.step}", "the weights are not finite")
        # A state that would only repeat the one before it is not worth the older one that is dropped for it.
        wanted = self.keeps_last_state if self.is_last else asked or (self.is_due and self.is_new(self.saved))
        if wanted:
            self.metrics.to_disk()
            save_state(self.out / "resume", self.trainer, self.identity, asdict(self.state), self.trainer.settings.keep)
            self.saved = self.trainer.step
        if asked and not self.is_last:
            raise Stopped(asked, saved=True)

    def is_new(self, since: int) -> bool:
        """Whether a step after `since` has changed the weights, and left them finite: what is worth saving, also after
        a step whose own update was skipped."""
        if self.trainer.updated <= since:
            return False
        return not any(self.trainer.ranks.gather(not_finite(self.trainer.model)))

    @property
    def is_last(self) -> bool:
        return self.trainer.step == self.trainer.plan.total_steps

    @property
    def is_due(self) -> bool:
        """Whether a state is saved after this step, as `save_every` has it."""
        return self.trainer.step % self.trainer.settings.save_every == 0

    def divergence_remedy(self) -> str:
        """What can be done after a run whose loss is not finite."""
        return "lower the learning rate, or look at the text of these steps"


def cannot_write(out: Path, error: Exception) -> RunError:
    why = reason(error)
    full = why in {os.strerror(number) for number in NO_SPACE}
    remedy = "free space" if full else "check the disk and its permissions"
    return RunError(str(out), f"cannot write ({why})", f"{remedy}; --resume goes on")
