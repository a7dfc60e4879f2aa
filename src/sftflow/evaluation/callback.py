"""Evaluation in the middle of training: a sample of each task, and checks of its replies, on the live weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sftflow.chat.render import Renderer
from sftflow.checkpoint import Assistant
from sftflow.evaluation.grading import grade_items
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import EvalTask
from sftflow.evaluation.reply_checks import check_replies
from sftflow.generation.engine import Engine
from sftflow.packing.attending import evaluating
from sftflow.runtime import Runtime

RATES = ("stop_rate", "empty_rate", "role_leak_rate", "self_turn_rate", "looping_rate")


@dataclass(frozen=True)
class EvalDuringTraining:
    """Evaluates `tasks` (of few items) whenever it is called."""

    tasks: Sequence[EvalTask]

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

        progress: told (items done, of how many).   tick: called between two tokens; what it raises ends the sample.
        """
        began = time.perf_counter()
        scores: dict[str, float] = {}
        replies: list[EvalRow] = []
        total, done = sum(len(task.items) for task in self.tasks), 0

        def step(k: int) -> None:
            nonlocal done
            done += k
            if progress:
                progress(done, total)

        with _generating(model):
            assistant = Assistant("", model, tokenizer, renderer, Engine(model, renderer, runtime, tick=tick), {})
            for task in self.tasks:
                rows = grade_items(assistant, task, "chat", progress=step)
                scores[task.name] = sum(r.score for r in rows) / len(rows)
                if not task.by_letter:
                    replies += [r for r in rows if r.finish_reason != "too_long"]
        found = check_replies(replies, renderer).to_json() if replies else {}
        rates = {name: found[name] for name in RATES if name in found}
        return {"tasks": scores, "hygiene": rates, "seconds": round(time.perf_counter() - began, 2)}


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Without dropout, and without compiling anew for the shapes of generation."""
    random = torch.random.get_rng_state()
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.random.set_rng_state(random)
