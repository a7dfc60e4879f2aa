"""Evaluation in the middle of training: a sample of each task, and the manners of its replies, on the live weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sftflow.chat.render import Renderer
from sftflow.checkpoint import Assistant
from sftflow.evaluation.prompts_for import TaskRun, grade_in_memory
from sftflow.evaluation.reply_checks import hygiene, said_of_row
from sftflow.generation.engine import Engine
from sftflow.runtime import Runtime

RATES = ("stop_rate", "empty_rate", "role_leak_rate", "self_turn_rate", "looping_rate")


@dataclass(frozen=True)
class Sampled:
    """Evaluates `runs` (small ones) whenever it is called."""

    runs: Sequence[TaskRun]

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: Renderer,
        runtime: Runtime,
        progress: Callable[[int, int], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """-> {"tasks": {NAME: score}, "hygiene": {RATE: share}, "seconds"}; the model is left as it was found.

        tick: called between two tokens; what it raises ends the sample.
        """
        began = time.perf_counter()
        tasks: dict[str, float] = {}
        said = []
        total, done = sum(len(r.items) for r in self.runs), 0
        with _resting(model):
            assistant = Assistant("", model, tokenizer, renderer, Engine(model, renderer, runtime, tick=tick), {})
            for run in self.runs:

                def step(k: int) -> None:
                    nonlocal done
                    done += k
                    if progress:
                        progress(done, total)

                rows = grade_in_memory(assistant, run, step)
                tasks[run.name] = sum(r.score for r in rows) / len(rows)
                if not all(i.choices for i in run.items):
                    said += [
                        said_of_row(r, assistant.engine.reply_decoder) for r in rows if r.finish_reason != "too_long"
                    ]
        found = hygiene(said, renderer).to_json() if said else {}
        manners = {name: found[name] for name in RATES if name in found}
        return {"tasks": tasks, "hygiene": manners, "seconds": round(time.perf_counter() - began, 2)}


@contextmanager
def _resting(model: Any) -> Iterator[None]:
    """Without dropout, and without compiling anew for the shapes of generation."""
    training, random = model.training, torch.random.get_rng_state()
    model.eval()
    stance = torch.compiler.set_stance("force_eager")
    try:
        with stance:
            yield
    finally:
        model.train(training)
        torch.random.set_rng_state(random)
