"""A comparison's figures: each task's scores, difference and verdict, its items, and the manners of the replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompt_replies import PromptReply
from sftflow.evaluation.evaluate import EvalResult
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.prompts_for import TaskRun
from sftflow.evaluation.reply_checks import Hygiene, hygiene, said_of_row
from sftflow.evaluation.statistics import detectable, holm, paired_interval, task_p_value, verdict, wilson


@dataclass(frozen=True)
class PairedResult:
    """One task's three results: the base in chat format and as plain text, and the SFT model."""

    run: TaskRun
    chat: EvalResult
    plain: EvalResult
    sft: EvalResult

    @property
    def better(self) -> EvalResult:
        """The base's better arm."""
        return self.chat if self.chat.score >= self.plain.score else self.plain


def task_entries(arms: Sequence[PairedResult], overlap: dict[str, Any]) -> dict[str, Any]:
    """compare.json's `tasks`, the p-values adjusted over all of them."""
    p_values = [task_p_value(a.better.scores, a.sft.scores) for a in arms]
    return {
        a.run.name: _entry(a, p, adjusted, overlap.get(a.run.name))
        for a, p, adjusted in zip(arms, p_values, holm(p_values), strict=True)
    }


def _entry(a: PairedResult, p: float, adjusted: float, overlap: Any) -> dict[str, Any]:
    better, after = a.better, a.sft
    low, high = paired_interval(better.scores, after.scores)
    return {
        "n": after.n,
        "chance": after.chance,
        "base": better.score,
        "base_chat": a.chat.score,
        "base_plain": a.plain.score,
        "base_arm": better.arm,
        "sft": after.score,
        "delta": after.score - better.score,
        "ci95": [low, high],
        "base_stderr": better.stderr,
        "sft_stderr": after.stderr,
        "wilson": {"base": list(wilson(better.score, better.n)), "sft": list(wilson(after.score, after.n))},
        "p_value": p,
        "p_holm": adjusted,
        "detectable": detectable(better.scores, after.scores),
        "verdict": verdict((low, high), after.n, adjusted),
        "metrics": {"base": better.metrics, "sft": after.metrics},
        "near_ties": {"base": better.near_ties, "sft": after.near_ties},
        "too_long": {side: sum(r.finish_reason == "too_long" for r in x.rows) for side, x in _sides(a)},
        "contamination": overlap,
        "max_new_tokens": a.run.task.max_new_tokens,
        "tokens": {side: sum(r.n_generated for r in x.rows) for side, x in _sides(a)},
    }


def _sides(a: PairedResult) -> list[tuple[str, EvalResult]]:
    return [("base", a.better), ("sft", a.sft)]


def item_rows(a: PairedResult) -> list[dict[str, Any]]:
    """Every item with its three replies, those that changed first."""
    rows = []
    for chat, plain, sft in zip(a.chat.rows, a.plain.rows, a.sft.rows, strict=True):
        before = (chat if a.better is a.chat else plain).score
        rows.append(
            {
                "id": sft.id,
                "question": sft.question,
                "answer": _answer_text(sft),
                "base": chat.reply,
                "base_plain": plain.reply,
                "sft": sft.reply,
                "base_score": chat.score,
                "base_plain_score": plain.score,
                "sft_score": sft.score,
                "base_finish": chat.finish_reason,
                "base_plain_finish": plain.finish_reason,
                "sft_finish": sft.finish_reason,
                "sft_tokens": sft.n_generated,
                "sft_seconds": sft.seconds,
                "change": change_of(before, sft.score),
            }
        )
    order = {"regressed": 0, "improved": 1}
    return sorted(rows, key=lambda r: order.get(r["change"], 2))


def change_of(before: float, after: float) -> str:
    """
    >>> change_of(0.0, 1.0), change_of(1.0, 0.5), change_of(1.0, 1.0), change_of(0.5, 0.5)
    ('improved', 'regressed', 'same right', 'same wrong')
    """
    if after != before:
        return "improved" if after > before else "regressed"
    return "same right" if after == 1 else "same wrong"


def _answer_text(row: EvalRow) -> str:
    return row.answer if isinstance(row.answer, str) else json.dumps(row.answer, ensure_ascii=False)


# ---- hygiene


def hygiene_of(assistant: Assistant, said: Sequence[PromptReply], results: Sequence[EvalResult]) -> Hygiene:
    """Over the replies to the fixed prompts, then those to the tasks that are answered in free text."""
    replies: list[Any] = [a.reply for a in said if a.reply is not None]
    for result in results:
        if result.rests_on["decoding"] == "greedy":
            replies += [
                said_of_row(r, assistant.engine.reply_decoder) for r in result.rows if r.finish_reason != "too_long"
            ]
    return hygiene(replies, assistant.renderer)


def flags_of(said: Sequence[PromptReply], found: Hygiene) -> list[list[str]]:
    """For each fixed prompt, in words, what hygiene has against its reply."""
    numbers: dict[int, int] = {}
    for i, answer in enumerate(said):
        if answer.reply is not None:
            numbers[i] = len(numbers)
    return [found.against(numbers[i]) if i in numbers else [] for i in range(len(said))]
