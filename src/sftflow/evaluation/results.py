"""What an evaluation gives: models -> tasks -> scores, with a graded row for each item as their evidence."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import Arm
from sftflow.evaluation.statistics import centred_mean, standard_error, wilson

CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores of one model on one task in one arm, with their rows.

    metrics: floats are shares or other measures, ints are counts.   provenance: what decides the rows: fingerprints of
    weights, format, code and items, and generation settings.   limit, available: as in `EvalTask`.
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
    def interval(self) -> tuple[float, float]:
        """95%, after Wilson."""
        return wilson(self.score, self.n)

    @property
    def near_ties(self) -> int:
        return sum(r.near_ties for r in self.rows)

    @property
    def too_long(self) -> int:
        """Items whose prompt does not fit the model's context."""
        return sum(r.finish_reason == "too_long" for r in self.rows)

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
            "metrics": self.metrics,
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

    def to_json(self) -> dict[str, Any]:
        """eval.json."""
        models = {name: scores.to_json() for name, scores in self.models.items()}
        return {"version": version("sftflow"), "models": models}
