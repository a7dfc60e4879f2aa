"""What a comparison found, as values: compare.json and the report are both made of a `Comparison`.

A field's name is its key in compare.json, and the fields stand in that file's order. Fields marked `NOT_IN_FILE` are
evidence that stands elsewhere on disk (graded rows, the run's own files), and are for whoever shows the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from sftflow.comparison.judge import JudgeResult, Verdict
from sftflow.comparison.lineage import BASE_AND_SFT, CONTINUED, REMARKS
from sftflow.comparison.prompt_results import PromptComparison, PromptGroup
from sftflow.comparison.prompts import PromptSet
from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.evaluation.contamination import Overlap
from sftflow.evaluation.heldout_loss import HeldOutLoss
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import Arm
from sftflow.evaluation.reply_checks import ReplyChecks

T = TypeVar("T")
FORGOT = 0.02
"""plain text this much worse, relative, counts as forgetting"""
SMALL_MODEL = 50_000_000
"""parameters"""
MOST_NAMED = 12
"""prompts in one line"""
NOT_IN_FILE = {"in_file": False}
ONLY_IF_GIVEN = {"in_file": "where it is not None"}


@dataclass(frozen=True)
class Both(Generic[T]):
    """The same figure of both models: of the base, or what training started from, and of the SFT model."""

    base: T
    sft: T

    @property
    def any(self) -> bool:
        return bool(self.base or self.sft)


@dataclass(frozen=True, kw_only=True)
class NotChecked:
    """Why something could not be measured, in one line."""

    not_checked: str


# ---- tasks


@dataclass(frozen=True, kw_only=True)
class ItemComparison:
    """One graded item: the base's row in chat format, its row as plain text, the SFT model's.

    change: 'improved', 'regressed', 'same right' or 'same wrong', against the base's arm that counts.
    """

    base: EvalRow
    base_plain: EvalRow
    sft: EvalRow
    change: str


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task's scores (0..1) and their paired difference.

    base: the better of base_chat and base_plain, so that the gain is never flattered.   base_arm: which one that is.
    ci95: of delta = sft - base.   p_holm: p_value corrected for the number of tasks.   detectable: the smallest
    difference that so many items show four times in five.   verdict: 'better', 'worse' or 'cannot tell at n=120'.
    metrics: other ways to grade; floats are shares, ints counts.   near_ties: choices that rounding could change.
    too_long: items that did not fit the context.   max_new_tokens: of a reply.   tokens: generated in all.
    items: those that changed first.
    """

    n: int
    chance: float
    base: float
    base_chat: float
    base_plain: float
    base_arm: Arm
    sft: float
    delta: float
    ci95: tuple[float, float]
    base_stderr: float
    sft_stderr: float
    wilson: Both[tuple[float, float]]
    p_value: float
    p_holm: float
    detectable: float
    verdict: str
    metrics: Both[Mapping[str, float | int]]
    near_ties: Both[int]
    too_long: Both[int]
    contamination: Overlap | NotChecked | None
    max_new_tokens: int
    tokens: Both[int]
    items: tuple[ItemComparison, ...] = field(metadata=NOT_IN_FILE)

    @property
    def outcome(self) -> str:
        """'better', 'worse' or 'unclear'"""
        return self.verdict if self.verdict in ("better", "worse") else "unclear"


# ---- losses


@dataclass(frozen=True, kw_only=True)
class HeldOutComparison:
    """Both models on the same held-out conversations. rows: how many the SFT model could be asked."""

    rows: int
    base: HeldOutLoss
    sft: HeldOutLoss


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Bits per byte of plain text before and after SFT; None, and why, where they could not be measured."""

    text: str
    bytes: int
    base: float | None
    sft: float | None
    not_checked: str | None = field(default=None, metadata=ONLY_IF_GIVEN)

    @property
    def change(self) -> float | None:
        """Relative; more is worse:  2.0 -> 2.1 bits per byte is 0.05"""
        return round(self.sft / self.base - 1, 4) if self.base and self.sft is not None else None

    @property
    def forgot(self) -> bool:
        return self.change is not None and self.change > FORGOT


# ---- the whole


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a comparison cost, beside the training that it is about.

    replies: of both models in all arms.   read, generated: tokens of their prompts, of themselves.   asking_seconds: of
    those that were not taken over from an earlier run.   train_seconds: of all steps; None where the run is not known.
    of_training: the comparison's seconds over these.
    """

    replies: int
    read: int
    generated: int
    asking_seconds: float
    train_seconds: float | None
    of_training: float | None


@dataclass(frozen=True, kw_only=True)
class NotJudged:
    """Why the judge's verdicts are missing, in one line."""

    not_judged: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Base versus SFT on the same items and prompts.

    kind: what the checkpoints show of how the two are related (`lineage`).   tasks: by name.
    centred_mean: mean over tasks of (score - chance) / (1 - chance).   prompts_in_training: how many of the fixed
    prompts stand in the training rows (`seen_counts`).   prompt_groups: what they say together, by group.
    held_out_loss: None where nothing was held out or the SFT model's run is not known.   seconds: what the comparison
    took.   n_parameters, finished, run: of the SFT model, of the comparison, and what lies beside the checkpoint.
    """

    version: str
    kind: str
    names: Both[str]
    tasks: Mapping[str, TaskComparison]
    centred_mean: Both[float | None]
    prompt_set: PromptSet
    prompts: tuple[PromptComparison, ...]
    prompts_in_training: Mapping[str, int] | NotChecked
    prompt_groups: Mapping[str, PromptGroup]
    hygiene: Both[ReplyChecks]
    held_out_loss: HeldOutComparison | NotChecked | None
    forgetting: Forgetting
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, Any]
    judge: JudgeResult | NotJudged | None = field(metadata=ONLY_IF_GIVEN)
    seconds: float
    cost: Cost
    n_parameters: int = field(metadata=NOT_IN_FILE)
    finished: datetime = field(metadata=NOT_IN_FILE)
    run: RunArtifacts = field(metadata=NOT_IN_FILE)

    @property
    def continued(self) -> bool:
        """Whether the start was instruction-tuned already."""
        return self.kind == CONTINUED

    @property
    def trained(self) -> bool:
        """Whether the SFT model is known to be trained from the other one."""
        return self.kind in (BASE_AND_SFT, CONTINUED)

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The judge's, prompt by prompt; none where no judge was asked."""
        return self.judge.rows if isinstance(self.judge, JudgeResult) else ()

    def remarks(self) -> list[str]:
        """What a reader of the scores must know beside them, in lines: lineage, forgetting, tasks that overlap
        with the training rows, a model too small to know much."""
        out = []
        if self.kind in REMARKS:
            out.append(REMARKS[self.kind])
        plain = self.forgetting
        if plain.change is not None:
            text = f"plain text: {plain.base:.3f} -> {plain.sft:.3f} bits per byte ({plain.change:+.1%}"
            out.append(text + (", it forgot some of its reading)" if plain.forgot and self.trained else ")"))
        for name, task in self.tasks.items():
            overlap = task.contamination
            if isinstance(overlap, Overlap) and overlap.contaminated:
                out.append(f"{name}: {overlap.contaminated} of {overlap.items} items share words with training rows")
        marked = [p.id for p in self.prompts if p.in_training]
        if marked:
            more = f" and {len(marked) - MOST_NAMED} more" if len(marked) > MOST_NAMED else ""
            out.append(f"fixed prompts that stand in the training rows: {', '.join(marked[:MOST_NAMED])}{more}")
        unknown = self.prompts_in_training
        if self.prompts and isinstance(unknown, NotChecked):
            out.append(f"not known which fixed prompts stand in the training rows: {unknown.not_checked}")
        if self.n_parameters < SMALL_MODEL:
            out.append(
                f"a {self.n_parameters / 1e6:.1f}M-parameter model knows what it was taught; other questions get weak"
                " answers (the report shows some)"
            )
        cost = self.cost
        told = f"compared in {self.seconds:.0f} s: {cost.replies:,} replies, {cost.read:,} tokens read"
        told += f", {cost.generated:,} generated"
        if cost.of_training is not None:
            told += f"; {cost.of_training:.2f} of the training's {cost.train_seconds:.0f} s"
        return [*out, told]

    def to_json(self) -> dict[str, Any]:
        """compare.json"""
        return fields_to_json(self)


def to_json(value: Any) -> Any:
    """A result as JSON has it: by its own `to_json` where it has one, else field by field.

    >>> to_json(Both((0.1, 0.2), NotChecked(not_checked="gone")))
    {'base': [0.1, 0.2], 'sft': {'not_checked': 'gone'}}
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return fields_to_json(value)
    if isinstance(value, Mapping):
        return {key: to_json(v) for key, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, list | tuple) else value


def fields_to_json(value: Any) -> dict[str, Any]:
    """The fields of a result that compare.json holds."""
    kept = [(f, getattr(value, f.name)) for f in fields(value) if f.metadata != NOT_IN_FILE]
    return {f.name: to_json(v) for f, v in kept if v is not None or f.metadata != ONLY_IF_GIVEN}
