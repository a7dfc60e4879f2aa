"""What an evaluation gives: models -> tasks -> scores, with a graded row for each item as their evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import Arm, How
from sftflow.evaluation.statistics import centred_mean, pass_at_k, standard_error, wilson

AS_USUAL = How()
TOLD_K = (1, 2, 5, 10, 20, 50, 100)
"""of pass@k"""
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")


def batched(rows: Sequence[EvalRow], k: int) -> Iterator[Sequence[EvalRow]]:
    """The rows, `k` at a time."""
    return (rows[i : i + k] for i in range(0, len(rows), k))


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores of one model on one task in one arm, with their rows.

    metrics: floats are shares or other measures, ints are counts.   provenance: what decides the rows: fingerprints of
    weights, format, code and items, and generation settings.   limit, available, how: as in `EvalTask`.   rows: of an
    item as many as `how.samples`, side by side.
    """

    task: str
    arm: Arm
    chance: float
    rows: tuple[EvalRow, ...]
    metrics: dict[str, float | int]
    provenance: dict[str, Any]
    limit: int | None = None
    available: int | None = None
    how: How = AS_USUAL

    @property
    def per_item(self) -> list[EvalRow]:
        """A row an item: of several, the first with the mean of their scores."""
        k = self.how.samples
        if k == 1:
            return list(self.rows)
        return [replace(rows[0], score=sum(r.score for r in rows) / k) for rows in batched(self.rows, k)]

    @property
    def scores(self) -> list[float]:
        """Of the items."""
        return [r.score for r in self.per_item]

    @property
    def n(self) -> int:
        """How many items."""
        return len(self.rows) // self.how.samples

    @property
    def pass_at(self) -> dict[str, float]:
        """pass@k where several replies to an item were graded right or wrong, for some k up to their number."""
        k = self.how.samples
        if k == 1 or not {r.score for r in self.rows} <= {0, 1}:
            return {}
        right = [sum(r.score == 1 for r in rows) for rows in batched(self.rows, k)]
        return {f"pass@{i}": sum(pass_at_k(k, c, i) for c in right) / len(right) for i in (*TOLD_K, k) if i <= k}

    @property
    def score(self) -> float:
        return sum(self.scores) / max(1, self.n)

    @property
    def stderr(self) -> float:
        return standard_error(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, after Wilson."""
        return wilson(self.score, self.n)

    @property
    def near_ties(self) -> int:
        return sum(r.near_ties for r in self.rows)

    @property
    def too_long(self) -> int:
        """Items whose prompt does not fit the model's context."""
        return sum(r.finish_reason == "too_long" for r in self.per_item)

    @property
    def tokens(self) -> int:
        """Generated tokens of all replies."""
        return sum(r.n_generated for r in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A task's entry in eval.json."""
        return {
            "n": self.n,
            "score": self.score,
            "stderr": self.stderr,
            "wilson95": list(self.interval),
            "chance": self.chance,
            "arm": self.arm,
            "metrics": {**self.metrics, **self.pass_at},
            "samples": self.how.samples,
            "near_ties": self.near_ties,
            "too_long": self.too_long,
            "tokens": self.tokens,
            "rests_on": self.provenance,
        }


@dataclass(frozen=True)
class ModelScores:
    """One model's results, in the order in which the tasks were asked."""

    results: tuple[EvalResult, ...]

    @property
    def tasks(self) -> dict[str, EvalResult]:
        return {r.task: r for r in self.results}

    @property
    def centred_mean(self) -> float | None:
        """Of all tasks; None where there are none."""
        return centred_mean([r.score for r in self.results], [r.chance for r in self.results])

    @property
    def chatcore(self) -> float | None:
        """The centred mean of the six tasks of ChatCORE; None unless all of them were asked."""
        six = ModelScores(tuple(r for r in self.results if r.task in CHATCORE))
        return six.centred_mean if len(six.results) == len(CHATCORE) else None

    def to_json(self) -> dict[str, Any]:
        """A model's entry in eval.json."""
        tasks = {r.task: r.to_json() for r in self.results}
        chatcore = {} if self.chatcore is None else {"chatcore": self.chatcore}
        return {"tasks": tasks, "centred_mean": self.centred_mean, **chatcore}


@dataclass(frozen=True)
class Evaluation:
    """Models by their names: `evaluation.models["runs/mine"].tasks["spelling"].score`."""

    models: dict[str, ModelScores]

    def missed(self, bars: Mapping[str, float]) -> list[str]:
        """A line for each model and task whose score is below what is required of the task."""
        return [
            f"{name}: {task} {r.score:.3f} (95% interval {r.interval[0]:.3f} to {r.interval[1]:.3f}, n={r.n})"
            f" is below the required {bar:g}"
            for name, model in self.models.items()
            for task, bar in bars.items()
            for r in [model.tasks[task]]
            if r.score < bar - 1e-9  # rounding: 3 of 10 are 0.3
        ]

    def to_json(self) -> dict[str, Any]:
        """eval.json."""
        models = {name: scores.to_json() for name, scores in self.models.items()}
        return {"version": version("sftflow"), "models": models}
