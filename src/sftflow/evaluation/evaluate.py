"""Evaluation: a model, a task, an arm (chat format or plain text) -> scored rows with their evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant, require_finite_weights
from sftflow.evaluation.grading import grade_items
from sftflow.evaluation.journal import EvalRow, Journal, safe_name, telling_full_disk
from sftflow.evaluation.lm_eval_format import harness_results
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import require_askable
from sftflow.evaluation.reply_checks import check_replies
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.fingerprint import GRADED_ROWS, code_hash, format_fingerprint, items_hash, weights_hash
from sftflow.foundation.atomic_io import write_json
from sftflow.tasks import chance_of

RATES = ("stop_rate", "empty_rate", "role_leak_rate", "self_turn_rate", "looping_rate")


def evaluate(
    assistant: Assistant,
    task: EvalTask,
    arm: Arm,
    out: Path,
    *,
    model: str | None = None,
    progress: Callable[[int], None] = lambda k: None,
) -> EvalResult:
    """Ask every item greedily and grade the replies; a row an item into `out/eval/`, as it finishes.

    Rows of an earlier run with the same provenance are taken over. model: its name in the file's. progress: told how
    many items are new. Raises RunError where the model's weights or logits are not finite, and where the disk is full
    (finished rows are kept).
    """
    provenance = provenance_of(assistant, task, arm)
    name = safe_name(model or assistant.name) + ("-plain" if arm == "plain" else "")
    path = out / "eval" / f"{name}-{task.name}.jsonl"
    with telling_full_disk(out), Journal(path, provenance) as journal:
        rows = grade_items(assistant, task, arm, journal, progress)
        journal.close([row.key for row in rows])
    return EvalResult(
        task=task.name,
        arm=arm,
        chance=chance_of(task.items),
        rows=tuple(rows),
        metrics=task.task.metrics([r.details for r in rows]) if any(r.details for r in rows) else {},
        provenance={**provenance, "data": items_hash(task.items)},
        limit=task.limit,
        available=task.available,
    )


def provenance_of(assistant: Assistant, task: EvalTask, arm: Arm) -> dict[str, Any]:
    """What decides a score beside its items: with all of this equal it comes out the same (near-ties aside)."""
    engine = assistant.engine
    return {
        "checkpoint": weights_of(assistant),
        "format": assistant.renderer.format.name if arm == "chat" else "plain text",
        "format_sha256": format_fingerprint(assistant.tokenizer, assistant.renderer.format),
        "stop_ids": sorted(assistant.renderer.stop_ids()),
        "code": code_hash(GRADED_ROWS),
        "versions": GRADED_ROWS.versions(),
        "grading": task.task.provenance(),
        "decoding": "letter probabilities" if task.by_letter else "greedy",
        "max_new_tokens": task.task.max_new_tokens,
        "stop": list(task.task.plain_stops) if arm == "plain" else [],
        "paragraph": arm == "plain" and task.task.plain_paragraph,
        "precision": engine.runtime.precision,
        "device": engine.runtime.device,
    }


def weights_of(assistant: Assistant) -> str:
    """The assistant's weights' fingerprint, computed once. Raises RunError where they are not finite."""
    known = assistant.info.get("weights_hash")
    if known is None:
        require_finite_weights(assistant.model, assistant.name)
        known = assistant.info["weights_hash"] = weights_hash(assistant.model)
    return str(known)


def evaluate_models(
    asked: Iterable[tuple[Assistant, Sequence[EvalTask]]],
    out: Path,
    progress: Callable[[str, str, int], None] = lambda model, task, k: None,
) -> Evaluation:
    """Every model on its tasks in its chat format; writes rows, eval.json and for each model a results file as
    lm-evaluation-harness writes them.

    asked: taken one after another, so that whoever loads models on the way holds one at a time.
    progress: told (model, task, how many items are new).
    """
    models: dict[str, ModelScores] = {}
    for assistant, tasks in asked:
        require_askable(assistant.renderer, tasks)
        name = assistant.name
        results = [evaluate(assistant, t, "chat", out, progress=partial(progress, name, t.name)) for t in tasks]
        models[name] = ModelScores(tuple(results))
        with telling_full_disk(out):
            write_json(out / "eval" / f"{safe_name(name)}-results.json", harness_results(assistant, results))
    evaluation = Evaluation(models)
    with telling_full_disk(out):
        write_json(out / "eval.json", evaluation.to_json())
    return evaluation


@dataclass(frozen=True)
class EvalDuringTraining:
    """A sample of each task in the middle of training: evaluates `tasks` (of few items), and checks the form of the
    replies, whenever it is called with the live assistant."""

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
