"""Evaluation: a model, a task, an arm (chat format or plain text) -> scored rows with their evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow import __version__
from sftflow.atomic_io import write_json
from sftflow.checkpoint import Assistant, require_finite_weights
from sftflow.evaluation.journal import EvalRow, Journal, key_of, safe_name, telling_full_disk
from sftflow.evaluation.lm_eval_format import harness_results
from sftflow.evaluation.prompts_for import Arm, Grading, Step, TaskRun, ask_items, prompts_of, require_askable
from sftflow.evaluation.statistics import centred_mean, standard_error, wilson
from sftflow.fingerprint import (
    GRADED_ROWS,
    code_hash,
    format_fingerprint,
    items_hash,
    weights_hash,
)
from sftflow.tasks import chance_of

CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores of one model on one task in one arm, with their rows.

    metrics: floats are shares or other measures, ints are counts.   provenance: fingerprints and generation settings.
    limit, available: as in `TaskRun`.
    """

    task: str
    arm: Arm
    chance: float
    rows: tuple[EvalRow, ...]
    metrics: dict[str, float | int]
    provenance: dict[str, Any]
    limit: int | None = None
    available: int | None = None

    @property
    def scores(self) -> list[float]:
        return [r.score for r in self.rows]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def score(self) -> float:
        return sum(self.scores) / max(1, self.n)

    @property
    def stderr(self) -> float:
        return standard_error(self.scores)

    @property
    def near_ties(self) -> int:
        return sum(r.near_ties for r in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A task's entry in eval.json."""
        return {
            "n": self.n,
            "score": self.score,
            "stderr": self.stderr,
            "wilson95": list(wilson(self.score, self.n)),
            "chance": self.chance,
            "arm": self.arm,
            "metrics": self.metrics,
            "near_ties": self.near_ties,
            "too_long": sum(r.finish_reason == "too_long" for r in self.rows),
            "tokens": sum(r.n_generated for r in self.rows),
            "rests_on": self.provenance,
        }


def evaluate(
    assistant: Assistant, run: TaskRun, arm: Arm, out: Path, *, model: str | None = None, progress: Step | None = None
) -> EvalResult:
    """Ask every item greedily and grade the replies; a row an item into `out/eval/`, as it finishes.

    Rows of an earlier run with the same provenance are taken over. model: its name in the file's. Raises RunError where
    the model's weights or logits are not finite, and where the disk is full (finished rows are kept).
    """
    prompts = prompts_of(assistant, run, arm)
    keys = [key_of(item, prompt.ids) for item, prompt in zip(run.items, prompts, strict=True)]
    provenance = provenance_of(assistant, run, arm)
    name = safe_name(model or assistant.name) + ("-plain" if arm == "plain" else "")
    step = progress or (lambda k: None)
    with telling_full_disk(out):
        journal = Journal(out / "eval" / f"{name}-{run.name}.jsonl", provenance)
        asked = None
        try:
            open_ones = [i for i, key in enumerate(keys) if key not in journal.rows]
            step(len(keys) - len(open_ones))
            with Grading(run, prompts, keys, journal.add, step) as grading:
                ask_items(assistant, run, arm, prompts, open_ones, grading)
            asked = keys
        finally:
            journal.close(asked)
    rows = tuple(journal.rows[key] for key in keys)
    return EvalResult(
        task=run.name,
        arm=arm,
        chance=chance_of(run.items),
        rows=rows,
        metrics=run.task.metrics([r.details for r in rows]) if any(r.details for r in rows) else {},
        provenance={**provenance, "data": items_hash(run.items)},
        limit=run.limit,
        available=run.available,
    )


def provenance_of(assistant: Assistant, run: TaskRun, arm: Arm) -> dict[str, Any]:
    """What decides a score beside its items: with all of this equal it comes out the same (near-ties aside)."""
    engine = assistant.engine
    return {
        "checkpoint": weights_of(assistant),
        "format": assistant.renderer.format.name if arm == "chat" else "plain text",
        "format_sha256": format_fingerprint(assistant.tokenizer, assistant.renderer.format),
        "code": code_hash(GRADED_ROWS),
        "versions": GRADED_ROWS.versions(),
        "grading": run.task.provenance(),
        "decoding": "letter probabilities" if run.by_letter else "greedy",
        "max_new_tokens": run.task.max_new_tokens,
        "stop": list(run.task.plain_stops) if arm == "plain" else [],
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


def summary(results: Sequence[EvalResult]) -> dict[str, Any]:
    """A model's entry of eval.json."""
    document: dict[str, Any] = {
        "tasks": {r.task: r.to_json() for r in results},
        "centred_mean": centred_mean([r.score for r in results], [r.chance for r in results]),
    }
    six = [r for r in results if r.task in CHATCORE]
    if len(six) == len(CHATCORE):
        document["chatcore"] = centred_mean([r.score for r in six], [r.chance for r in six])
    return document


def evaluate_models(
    asked: Iterable[tuple[Assistant, Sequence[TaskRun]]],
    out: Path,
    progress: Callable[[str, str, int], None] | None = None,
) -> dict[str, Any]:
    """`sftflow eval`: every model on its tasks in its chat format; writes rows, eval.json and for each model a results
    file as lm-evaluation-harness writes them. Returns eval.json.

    asked: taken one after another, so that whoever loads models on the way holds one at a time.
    """
    models: dict[str, Any] = {}
    for assistant, runs in asked:
        require_askable(assistant.renderer, runs)
        results = []
        for run in runs:

            def tell(k: int, model: str = assistant.name, task: str = run.name) -> None:
                if progress:
                    progress(model, task, k)

            results.append(evaluate(assistant, run, "chat", out, progress=tell))
        models[assistant.name] = summary(results)
        with telling_full_disk(out):
            write_json(out / "eval" / f"{safe_name(assistant.name)}-results.json", harness_results(assistant, results))
    document = {"version": __version__, "models": models}
    with telling_full_disk(out):
        write_json(out / "eval.json", document)
    return document
