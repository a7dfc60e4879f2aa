"""Base versus SFT: the same items, the same fixed prompts, paired differences.

The base is asked twice, through the chat format and as plain text, because its chat tokens are untrained. Its
better arm counts, so that the gain is never flattered.

    tasks and fixed prompts (evaluation) -> reply checks -> losses, overlap with the training rows -> judge
    -> Comparison, compare.json, eval.json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from sftflow.checkpoint import Assistant
from sftflow.comparison.judge import JudgeResult, ReplyPair, check_judge, judge_pairs
from sftflow.comparison.lineage import is_tuned, kind_of
from sftflow.comparison.losses import forgetting, held_out_comparison, overlap_with_training, prompts_seen
from sftflow.comparison.paired import PairedResult, check_all_replies, task_comparisons
from sftflow.comparison.prompt_replies import PROMPT_TOKENS, PromptAsking, with_faults
from sftflow.comparison.prompt_results import PromptComparison, prompt_groups, seen_counts
from sftflow.comparison.prompts import PromptSet, load_prompts
from sftflow.comparison.results import Both, Comparison, Cost, NotChecked, NotJudged
from sftflow.comparison.run_artifacts import read_run
from sftflow.evaluation.cost import USUAL, Estimate
from sftflow.evaluation.evaluate import Asked, evaluate_together, weights_of
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import Arm, EvalTask, How
from sftflow.evaluation.prompts_for import require_askable
from sftflow.evaluation.reply_checks import ReplyChecks
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.evaluation.side_by_side import running
from sftflow.fingerprint import GRADED_ROWS, code_hash, format_fingerprint, items_hash
from sftflow.foundation.atomic_io import write_json
from sftflow.foundation.errors import RecipeError, SftflowError
from sftflow.foundation.ranks import Count, ranks
from sftflow.generation.request import Reply
from sftflow.recipe import Compare

JUDGE_KEY = "SFTFLOW_JUDGE_KEY"
"""environment variable of the judge's API key"""

Progress = Callable[[str, int, int], None]  # (what, done, total)
Steps = Callable[[str], Callable[[int], None]]


def checked_prompts(asked: Compare) -> PromptSet:
    """The fixed prompts, after asking the judge, where one is named, whether it is there."""
    if bool(asked.judge) != bool(asked.judge_model):
        raise RecipeError("--judge", "it needs --judge-model, and that needs --judge", "give both")
    prompts = load_prompts(asked.prompts)
    if asked.judge and asked.judge_model and ranks().first:
        check_judge(asked.judge, asked.judge_model, os.environ.get(JUDGE_KEY))
    return prompts


def compare_models(
    base: Assistant,
    sft: Assistant,
    runs: Sequence[EvalTask],
    prompts: PromptSet,
    out: Path,
    *,
    run_directory: Path | None = None,
    asked: Compare = Compare(),
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compare, and write compare.json, eval.json and a row an item into `out`.

    run_directory: of the SFT model's training, for ledger, losses and the overlap of the tasks with its rows.
    asked: its judge; the prompts are those given.
    """
    began = time.perf_counter()
    names = Both(base.name, sft.name if sft.name != base.name else f"{sft.name} (again)")
    for assistant in (base, sft):
        require_askable(assistant.renderer, runs)
        weights_of(assistant)  # which refuses weights that are not finite
    steps = _steps(progress, 3 * (sum(r.n_replies for r in runs) + len(prompts.prompts)))
    ways: tuple[tuple[Assistant, Arm, str, str], ...] = (
        (base, "chat", "base", "base, chat format"),
        (base, "plain", "base", "base, plain text"),
        (sft, "chat", "sft", "SFT"),
    )
    readings = [PromptAsking(assistant, arm, prompts, steps(f"prompts: {what}")) for assistant, arm, _, what in ways]
    found = evaluate_together(
        [
            Asked(assistant=assistant, task=run, arm=arm, model=model, progress=steps(f"{run.name}: {what}"))
            for run in runs
            for assistant, arm, model, what in ways
        ],
        out,
        also=readings,
        tell=lambda cost: say(_told(cost, len(ways))),
    )
    asked_for = time.perf_counter() - began
    results = [PairedResult(run, *found[3 * number :][:3]) for number, run in enumerate(runs)]
    scores = Both(ModelScores(tuple(r.better for r in results)), ModelScores(tuple(r.sft for r in results)))
    replies, checks = _prompts_and_checks(base, sft, prompts, results, readings)
    say("held-out loss, forgetting, overlap with the training rows")
    held_out, forgotten = held_out_comparison(base, sft, run_directory), forgetting(base, sft)
    with ranks().patient() as gather:
        if not ranks().first:  # what is left needs no model: one sums up, writes, and asks the judge
            return cast(Comparison, gather(None)[0])
        seen = prompts_seen(prompts.prompts, sft, run_directory)
        if not isinstance(seen, NotChecked):
            replies = tuple(replace(p, seen=s) for p, s in zip(replies, seen, strict=True))
        seconds, run = round(time.perf_counter() - began, 1), read_run(run_directory)
        comparison = Comparison(
            version=version("sftflow"),
            kind=kind_of(base, sft),
            names=names,
            tasks=task_comparisons(results, overlap_with_training(runs, sft, run_directory)),
            centred_mean=Both(scores.base.centred_mean, scores.sft.centred_mean),
            prompt_set=prompts,
            prompts=replies,
            prompts_in_training=seen if isinstance(seen, NotChecked) else seen_counts(seen),
            prompt_groups=prompt_groups(replies),
            hygiene=checks,
            held_out_loss=held_out,
            forgetting=forgotten,
            settings=_settings(sft, runs),
            fingerprints=_fingerprints(base, sft, runs),
            judge=_judged(replies, is_tuned(base), asked, progress),
            seconds=seconds,
            cost=_cost(found, readings, round(asked_for, 1), seconds, run.train_seconds),
            n_parameters=sft.model.num_parameters(),
            finished=datetime.now(UTC),
            run=run,
        )
        write_json(out / "compare.json", comparison.to_json())
        write_json(out / "eval.json", Evaluation({names.base: scores.base, names.sft: scores.sft}).to_json())
        return cast(Comparison, gather(comparison)[0])


def _steps(progress: Progress, total: int) -> Steps:
    """-> a function of what is being asked, which gives one that is told how many more replies of it are done."""
    done = Count()

    def more(what: str, k: int) -> None:
        progress(what, done.add(k), total)

    return lambda what: partial(more, what)


def _prompts_and_checks(
    base: Assistant,
    sft: Assistant,
    prompts: PromptSet,
    results: Sequence[PairedResult],
    readings: Sequence[PromptAsking],
) -> tuple[tuple[PromptComparison, ...], Both[ReplyChecks]]:
    """The fixed prompts with their replies, and the form of all replies of both models in their chat format checked."""
    chat, plain, after = (reading.in_order() for reading in readings)
    checks = Both(
        check_all_replies(base, chat, [r.chat for r in results]),
        check_all_replies(sft, after, [r.sft for r in results]),
    )
    rows = zip(prompts.prompts, with_faults(chat, checks.base), plain, with_faults(after, checks.sft), strict=True)
    compared = tuple(
        PromptComparison(
            id=p.id, kind=p.kind, messages=p.messages_json(), base=b, base_plain=q, sft=s, expects=p.expects
        )
        for p, b, q, s in rows
    )
    return compared, checks


def _told(cost: Estimate, arms: int) -> str:
    """What is said before it begins."""
    work, (usual, most) = cost.work, cost.seconds
    if not work.replies:
        return "comparison: every reply is known from an earlier run"
    return (
        f"comparison: {arms} arms, {work.replies:,} replies to come; {work.read:,} tokens to read, at most"
        f" {work.most:,} to generate; {usual / 60:.1f} min if replies use {USUAL:.0%} of their limits, at most"
        f" {most / 60:.1f} min, by a short probe; losses come on top"
    )


def _cost(
    found: Sequence[EvalResult],
    readings: Sequence[PromptAsking],
    asking: float,
    seconds: float,
    training: float | None,
) -> Cost:
    """asking, seconds, training: what asking, the whole and the training took."""
    replies: list[Reply | EvalRow] = [row for result in found for row in result.rows]
    replies += [r.reply for reading in readings for r in reading.in_order() if r.reply is not None]
    return Cost(
        replies=len(replies),
        read=sum(r.n_prompt for r in replies if r.finish_reason != "too_long"),
        generated=sum(r.n_generated for r in replies),
        asking_seconds=asking,
        train_seconds=training,
        of_training=round(seconds / training, 3) if training else None,
    )


def _settings(sft: Assistant, runs: Sequence[EvalTask]) -> dict[str, Any]:
    how = runs[0].how if runs else How()
    drawn = f"tasks at temperature {how.temperature:g}, prompts greedy" if how.temperature else "greedy"
    asked = {"tasks are asked with": told} if (told := how.told()) else {}
    return {
        "decoding": f"{drawn}; multiple choice by the probability of its letters",
        **asked,
        "precision": sft.engine.runtime.precision,
        "device": sft.engine.runtime.device,
        "replies side by side": running(sft.engine),
        "tokens a prompt": PROMPT_TOKENS,
        "tokens a task": {r.name: r.max_new_tokens for r in runs},
        "interval": "95%, paired bootstrap, 10,000 resamples",
        "p": "exact McNemar (fractional scores: sign flips); Holm over the tasks",
    }


def _fingerprints(base: Assistant, sft: Assistant, runs: Sequence[EvalTask]) -> dict[str, Any]:
    return {
        "base": format_fingerprint(base.tokenizer, base.renderer.format),
        "sft": format_fingerprint(sft.tokenizer, sft.renderer.format),
        "base_weights": weights_of(base),
        "sft_weights": weights_of(sft),
        "code": code_hash(GRADED_ROWS),
        "data": {r.name: items_hash(r.items) for r in runs},
    }


def _judged(
    prompts: Sequence[PromptComparison], tuned: bool, asked: Compare, progress: Progress
) -> JudgeResult | NotJudged | None:
    """Verdicts on the fixed prompts. A base without a format of its own is judged by its plain-text reply."""
    if not asked.judge or not asked.judge_model:
        return None
    pairs = [
        ReplyPair(id=p.id, messages=p.messages, a=p.sft.text, b=before.text)
        for p in prompts
        for before in [p.base if tuned else p.base_plain]
        if p.sft.reply is not None and before.reply is not None
    ]
    try:
        return judge_pairs(
            pairs,
            asked.judge,
            asked.judge_model,
            api_key=os.environ.get(JUDGE_KEY),
            progress=partial(progress, "judge"),
        )
    except SftflowError as error:  # it answered before: what was measured must not be lost with it
        return NotJudged(not_judged=str(error))
