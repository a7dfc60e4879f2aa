"""Evaluation: a model, a task, an arm (chat format or plain text) -> scored rows with their evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant, require_finite_weights
from sftflow.evaluation.cost import Estimate, estimate
from sftflow.evaluation.grading import Asking, ask_all
from sftflow.evaluation.journal import EvalRow, Journal, safe_name, telling_full_disk
from sftflow.evaluation.lm_eval_format import harness_results
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import in_mode, require_askable
from sftflow.evaluation.reply_checks import check_replies
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.evaluation.side_by_side import Asker
from sftflow.fingerprint import GRADED_ROWS, code_hash, format_fingerprint, items_hash, weights_hash
from sftflow.foundation.atomic_io import write_json
from sftflow.foundation.errors import RunError
from sftflow.foundation.ranks import Count, ranks
from sftflow.tasks import chance_of
from sftflow.training.signals import Stopped

RATES = ("stop_rate", "empty_rate", "role_leak_rate", "self_turn_rate", "looping_rate")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model on one task. model: its name in the file's; None: its own.   progress: told how many items are new."""

    assistant: Assistant
    task: EvalTask
    arm: Arm = "chat"
    model: str | None = None
    progress: Callable[[int], None] = lambda k: None


def evaluate(
    assistant: Assistant,
    task: EvalTask,
    arm: Arm,
    out: Path,
    *,
    model: str | None = None,
    progress: Callable[[int], None] = lambda k: None,
) -> EvalResult:
    """`evaluate_together` of one."""
    return evaluate_together([Asked(assistant=assistant, task=task, arm=arm, model=model, progress=progress)], out)[0]


def evaluate_together(
    asked: Sequence[Asked],
    out: Path,
    also: Sequence[Asker] = (),
    tell: Callable[[Estimate], None] | None = None,
) -> list[EvalResult]:
    """Ask every item and grade the replies; a row a reply into `out/eval/`, as it finishes.

    also: who else wants replies of these models, which are generated beside the others.   tell: called before it begins
    with what is left to ask, and what that will cost.

    Rows of an earlier run with the same provenance are taken over. Several ranks share what is left, batch by batch;
    each has all results then.   Raises RunError where a model's weights or logits are not finite, where the disk is
    full (finished rows are kept), and where the ranks are not given the same.
    """
    asked = [replace(each, assistant=in_mode(each.assistant, each.task)) for each in asked]
    provenances = [provenance_of(each.assistant, each.task, each.arm) for each in asked]
    whole = [{**p, "data": items_hash(each.task.items)} for p, each in zip(provenances, asked, strict=True)]
    _require_alike(whole)
    with telling_full_disk(out), ExitStack() as stack:
        askings = []
        for each, provenance in zip(asked, provenances, strict=True):
            name = safe_name(each.model or each.assistant.name) + ("-plain" if each.arm == "plain" else "")
            path = out / "eval" / f"{name}-{each.task.name}.jsonl"
            journal = stack.enter_context(Journal(path, provenance))
            askings.append(Asking(each.assistant, each.task, each.arm, journal, each.progress))
        if tell and ranks().first:
            tell(estimate([*askings, *also]))
        rows = ask_all(askings, also=also)
        for asking, graded in zip(askings, rows, strict=True):
            if asking.journal:
                asking.journal.close(graded)
    return [_result(each, graded, made_by) for each, graded, made_by in zip(asked, rows, whole, strict=True)]


def _require_alike(provenances: list[dict[str, Any]]) -> None:
    """Raises RunError where the ranks do not ask the same of the same."""
    here = ranks()
    for number, theirs in enumerate(here.gather(provenances)):
        pairs = zip(theirs, here.from_first(provenances), strict=True)
        if keys := [key for one, other in pairs for key in one if one[key] != other[key]]:
            fact = f"it does not ask what rank 0 asks ({', '.join(dict.fromkeys(keys))} differ)"
            raise RunError(f"rank {number}", fact, "give all machines the same files, versions and devices")


def _result(asked: Asked, rows: Sequence[EvalRow], provenance: dict[str, Any]) -> EvalResult:
    task = asked.task
    return EvalResult(
        task=task.name,
        arm=asked.arm,
        chance=chance_of(task.items),
        rows=tuple(rows),
        metrics=task.task.metrics([r.details for r in rows]) if any(r.details for r in rows) else {},
        how=task.how,
        provenance=provenance,
        limit=task.limit,
        available=task.available,
    )


def provenance_of(assistant: Assistant, task: EvalTask, arm: Arm) -> dict[str, Any]:
    """What decides a score beside its items: with all of this equal it comes out the same (near-ties aside)."""
    engine, temperature = assistant.engine, task.how.temperature
    decoding = f"temperature {temperature:g}, seeds of item and sample" if temperature else "greedy"
    return {
        "checkpoint": weights_of(assistant),
        "format": assistant.renderer.format.name if arm == "chat" else "plain text",
        "format_sha256": format_fingerprint(assistant.tokenizer, assistant.renderer.format),
        "stop_ids": sorted(assistant.renderer.stop_ids()),
        "code": code_hash(GRADED_ROWS),
        "versions": GRADED_ROWS.versions(),
        "grading": task.task.provenance(),
        "decoding": "letter probabilities" if task.by_letter else decoding,
        "shots": task.how.shots,
        "max_new_tokens": task.max_new_tokens,
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
        asked_of = [Asked(assistant=assistant, task=t, progress=partial(progress, name, t.name)) for t in tasks]
        results = evaluate_together(asked_of, out)
        models[name] = ModelScores(tuple(results))
        if ranks().first:
            with telling_full_disk(out):
                write_json(out / "eval" / f"{safe_name(name)}-results.json", harness_results(assistant, results))
    evaluation = Evaluation(models)
    if ranks().first:
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

        progress: told (items done, of how many).   Raises Stopped on all ranks where one was stopped.
        """
        began = time.perf_counter()
        total, done = sum(task.n_replies for task in self.tasks), Count()
        step = (lambda k: progress(done.add(k), total)) if progress else (lambda k: None)
        graded = ask_all([Asking(in_mode(assistant, t), t, "chat", None, step) for t in self.tasks], agree=(Stopped,))
        scores: dict[str, float] = {}
        replies: list[EvalRow] = []
        for task, rows in zip(self.tasks, graded, strict=True):
            scores[task.name] = sum(r.score for r in rows) / len(rows)
            if not task.by_letter:
                replies += [r for r in rows if r.finish_reason != "too_long"]
        found = check_replies(replies, assistant.renderer).to_json() if replies else {}
        rates = {name: found[name] for name in RATES if name in found}
        return {"tasks": scores, "hygiene": rates, "seconds": round(time.perf_counter() - began, 2)}
