"""Two models on the same items: a task's scores, their paired difference, its verdict, and its items side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompt_results import PromptReply
from sftflow.comparison.results import Both, ItemComparison, NotChecked, TaskComparison
from sftflow.evaluation.contamination import Overlap
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import EvalTask
from sftflow.evaluation.reply_checks import ReplyChecks, check_replies
from sftflow.evaluation.results import EvalResult
from sftflow.evaluation.statistics import detectable, holm, paired_interval, task_p_value, verdict
from sftflow.generation.request import Reply


@dataclass(frozen=True)
class PairedResult:
    """One task's three results: the base in chat format and as plain text, and the SFT model."""

    run: EvalTask
    chat: EvalResult
    plain: EvalResult
    sft: EvalResult

    @property
    def better(self) -> EvalResult:
        """The base's better arm."""
        return self.chat if self.chat.score >= self.plain.score else self.plain


def task_comparisons(
    results: Sequence[PairedResult], overlap: Mapping[str, Overlap | NotChecked]
) -> dict[str, TaskComparison]:
    """The tasks by name, with p-values adjusted over all of them. overlap: with the training rows, by task."""
    p_values = [task_p_value(r.better.scores, r.sft.scores) for r in results]
    tasks = {}
    for result, p, adjusted in zip(results, p_values, holm(p_values), strict=True):
        name, before, after = result.run.name, result.better, result.sft
        interval = paired_interval(before.scores, after.scores)
        tasks[name] = TaskComparison(
            n=after.n,
            chance=after.chance,
            base=before.score,
            base_chat=result.chat.score,
            base_plain=result.plain.score,
            base_arm=before.arm,
            sft=after.score,
            delta=after.score - before.score,
            ci95=interval,
            base_stderr=before.stderr,
            sft_stderr=after.stderr,
            wilson=Both(before.interval, after.interval),
            p_value=p,
            p_holm=adjusted,
            detectable=detectable(before.scores, after.scores),
            verdict=verdict(interval, after.n, adjusted),
            metrics=Both({**before.metrics, **before.pass_at}, {**after.metrics, **after.pass_at}),
            near_ties=Both(before.near_ties, after.near_ties),
            too_long=Both(before.too_long, after.too_long),
            contamination=overlap.get(name),
            max_new_tokens=result.run.max_new_tokens,
            tokens=Both(before.tokens, after.tokens),
            items=changed_first(result),
        )
    return tasks


def changed_first(result: PairedResult) -> tuple[ItemComparison, ...]:
    """Every item with its three rows: those that got worse, those that got better, then the others in their order."""
    items = [
        ItemComparison(
            base=chat,
            base_plain=plain,
            sft=sft,
            change=change_of((chat if result.better is result.chat else plain).score, sft.score),
        )
        for chat, plain, sft in zip(result.chat.per_item, result.plain.per_item, result.sft.per_item, strict=True)
    ]
    order = {"regressed": 0, "improved": 1}
    return tuple(sorted(items, key=lambda item: order.get(item.change, 2)))


def change_of(before: float, after: float) -> str:
    """
    >>> change_of(0.0, 1.0), change_of(1.0, 0.5), change_of(1.0, 1.0), change_of(0.5, 0.5)
    ('improved', 'regressed', 'same right', 'same wrong')
    """
    if after != before:
        return "improved" if after > before else "regressed"
    return "same right" if after == 1 else "same wrong"


def check_all_replies(
    assistant: Assistant, replies: Sequence[PromptReply], results: Sequence[EvalResult]
) -> ReplyChecks:
    """Over the replies to the fixed prompts, then those to the tasks that are answered in free text."""
    checked: list[Reply | EvalRow] = [r.reply for r in replies if r.reply is not None]
    for result in results:
        if result.provenance["decoding"] != "letter probabilities":
            checked += [row for row in result.rows if row.finish_reason != "too_long"]
    return check_replies(checked, assistant.renderer)
