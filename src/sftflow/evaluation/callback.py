"""Evaluation in the middle of training: a sample of each task, and checks of its replies, on the live weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.evaluation.grading import grade_items
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import EvalTask
from sftflow.evaluation.reply_checks import check_replies

RATES = ("stop_rate", "empty_rate", "role_leak_rate", "self_turn_rate", "looping_rate")


@dataclass(frozen=True)
class EvalDuringTraining:
    """Evaluates `tasks` (of few items) whenever training calls it with the live assistant."""

    tasks: Sequence[EvalTask]

    def __call__(self, assistant: Assistant, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """-> {"tasks": {NAME: score}, "hygiene": {RATE: share}, "seconds"}

        progress: told (items done, of how many).
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

        for task in self.tasks:
            rows = grade_items(assistant, task, "chat", None, step)
            scores[task.name] = sum(r.score for r in rows) / len(rows)
            if not task.by_letter:
                replies += [r for r in rows if r.finish_reason != "too_long"]
        found = check_replies(replies, assistant.renderer).to_json() if replies else {}
        rates = {name: found[name] for name in RATES if name in found}
        return {"tasks": scores, "hygiene": rates, "seconds": round(time.perf_counter() - began, 2)}
