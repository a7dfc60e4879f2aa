"""Base versus SFT: the same items, the same fixed prompts, paired differences, one report.

The base is asked twice, through the chat format and as plain text, because its chat tokens are untrained. Its
better arm counts, so that the gain is never flattered.

    tasks (evals) -> prompts (answers) -> hygiene -> losses and overlap with the training rows (evidence) -> judge
    -> compare.json (all of it) -> report.html
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftflow import __version__
from sftflow.atomic_io import write_json, write_text
from sftflow.chat.format import fingerprint
from sftflow.checkpoint import Assistant
from sftflow.comparison.paired import PairedResult, flags_of, hygiene_of, item_rows, task_entries
from sftflow.comparison.prompt_replies import PROMPT_TOKENS, PromptReply, answers, shown
from sftflow.comparison.prompts import PromptSet
from sftflow.comparison.run_artifacts import beside_run, held_out_and_overlap, plain_text_loss
from sftflow.errors import SftflowError
from sftflow.evaluation.evaluate import evaluate, summary, weights_of
from sftflow.evaluation.journal import code_hash, items_hash
from sftflow.evaluation.prompts_for import TaskRun, require_askable
from sftflow.evaluation.statistics import centred_mean

ROWS_IN_REPORT = 300


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare.json` holds, and what the report is made of."""

    document: dict[str, Any]
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Who judges the replies to the fixed prompts: an OpenAI-compatible endpoint and a model of it."""

    url: str
    model: str
    api_key: str | None = None


Progress = Callable[[str, int, int], None]  # (what, done, total)


def compare_models(
    base: Assistant,
    sft: Assistant,
    runs: Sequence[TaskRun],
    prompts: PromptSet,
    out: Path,
    *,
    run_directory: Path | None = None,
    judge: JudgeSpec | None = None,
    plain_text: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run the comparison and write compare.json, report.html and a row an item into `out`.

    run_directory: of the SFT model's training, for ledger, losses and the overlap of the tasks with its rows.
    plain_text: what forgetting is measured on, instead of the text that comes with the package.
    """
    from sftflow.report.comparison_page import render_report

    began = time.perf_counter()
    for assistant in (base, sft):
        require_askable(assistant.renderer, runs)
        weights_of(assistant)  # which refuses weights that are not finite
    total = sum(len(r.items) for r in runs) * 3 + len(prompts.prompts) * 3
    done = 0

    def tell(what: str) -> Callable[[int], None]:
        def step(k: int) -> None:
            nonlocal done
            done += k
            if progress:
                progress(what, done, total)

        return step

    arms = [
        PairedResult(
            run,
            evaluate(base, run, "chat", out, model="base", progress=tell(f"{run.name}: base, chat format")),
            evaluate(base, run, "plain", out, model="base", progress=tell(f"{run.name}: base, plain text")),
            evaluate(sft, run, "chat", out, model="sft", progress=tell(f"{run.name}: SFT")),
        )
        for run in runs
    ]
    said = {
        "base": answers(base, prompts, "chat", tell("prompts: base, chat format")),
        "base_plain": answers(base, prompts, "plain", tell("prompts: base, plain text")),
        "sft": answers(sft, prompts, "chat", tell("prompts: SFT")),
    }
    manners = {
        "base": hygiene_of(base, said["base"], [a.chat for a in arms]),
        "sft": hygiene_of(sft, said["sft"], [a.sft for a in arms]),
    }
    flags = {side: flags_of(said[side], manners[side]) for side in manners}
    say("held-out loss, forgetting, overlap with the training rows")
    losses, overlap = held_out_and_overlap(base, sft, runs, run_directory)
    tasks = task_entries(arms, overlap)
    chances = [t["chance"] for t in tasks.values()]
    document: dict[str, Any] = {
        "version": __version__,
        "kind": kind_of(base),
        "names": {"base": base.name, "sft": sft.name},
        "tasks": tasks,
        "centred_mean": {side: centred_mean([t[side] for t in tasks.values()], chances) for side in ("base", "sft")},
        "prompt_set": {"name": prompts.name, "version": prompts.version, "sha256": prompts.sha256},
        "prompts": shown(prompts, said["base"], said["base_plain"], said["sft"], flags),
        "hygiene": {side: h.to_json() for side, h in manners.items()},
        "held_out_loss": losses,
        "forgetting": plain_text_loss(base, sft, plain_text),
        "settings": {
            "decoding": "greedy; multiple choice by the probability of its letters",
            "precision": sft.engine.runtime.precision,
            "device": sft.engine.runtime.device,
            "replies side by side": sft.engine.max_running,
            "tokens a prompt": PROMPT_TOKENS,
            "tokens a task": {a.run.name: a.run.task.max_new_tokens for a in arms},
            "interval": "95%, paired bootstrap, 10,000 resamples",
            "p": "exact McNemar (fractional scores: sign flips); Holm over the tasks",
        },
        "fingerprints": {
            "base": fingerprint(base.tokenizer, base.renderer.format),
            "sft": fingerprint(sft.tokenizer, sft.renderer.format),
            "base_weights": weights_of(base),
            "sft_weights": weights_of(sft),
            "code": code_hash(),
            "data": {a.run.name: items_hash(a.run.items) for a in arms},
        },
    }
    if judge is not None:
        document["judge"] = _judged(judge, document["prompts"], said, document["kind"], progress)
    document["seconds"] = round(time.perf_counter() - began, 1)
    report = _report_data(document, arms, sft, run_directory)
    write_json(out / "compare.json", document)
    models = {base.name: summary([a.better for a in arms]), sft.name: summary([a.sft for a in arms])}
    write_json(out / "eval.json", {"version": __version__, "models": models})
    write_text(out / "report.html", render_report(report))
    return Comparison(document=document, report=report)


def kind_of(base: Assistant) -> str:
    """A base that brings a chat template of its own has been instruction-tuned before."""
    tuned = base.info.get("own_template") or base.info.get("kind") == "sft"
    return "continued SFT" if tuned else "base-versus-SFT"


def base_format(sft: Assistant) -> Any:
    """The SFT model's format, to be given to a base that has none: with the control tokens it needs."""
    chat_format = sft.renderer.format
    tokens = tuple(t for t in sft.renderer.special if t in chat_format.template)
    return replace(chat_format, tokens=tokens)


# ---- the judge and the report


def _judged(
    spec: JudgeSpec,
    prompts: Sequence[dict[str, Any]],
    said: dict[str, list[PromptReply]],
    kind: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """The judge's word on the fixed prompts. A base without a format of its own is judged by its plain-text reply."""
    from sftflow.comparison.judge import Pair, judge_pairs

    side = "base" if kind == "continued SFT" else "base_plain"
    pairs = [
        Pair(id=p["id"], messages=p["messages"], a=said["sft"][i].text, b=said[side][i].text)
        for i, p in enumerate(prompts)
        if said["sft"][i].reply is not None and said[side][i].reply is not None
    ]
    try:
        judged = judge_pairs(
            pairs,
            spec.url,
            spec.model,
            api_key=spec.api_key,
            progress=(lambda done, total: progress("judge", done, total)) if progress else None,
        )
    except SftflowError as error:  # it answered before: what was measured must not be lost with it
        return {"not_judged": str(error)}
    return judged.to_json()


def _report_data(
    document: dict[str, Any], arms: Sequence[PairedResult], sft: Assistant, run: Path | None
) -> dict[str, Any]:
    """compare.json, every item's replies, and what lies beside the checkpoint, as the report takes it."""
    beside = beside_run(run)
    tasks = {}
    for a in arms:
        rows = item_rows(a)
        left_out = max(0, len(rows) - ROWS_IN_REPORT)
        tasks[a.run.name] = {
            **document["tasks"][a.run.name],
            "rows": rows[:ROWS_IN_REPORT],
            **({"rows_left_out": left_out} if left_out else {}),
        }
    plain_words = {k: ", ".join(f"{n} {v}" for n, v in x.items()) for k, x in _nested(document["settings"])}
    data = {k: ", ".join(f"{n} {v}" for n, v in x.items()) for k, x in _nested(document["fingerprints"])}
    return {
        **document,
        **{k: beside[k] for k in ("ledger", "loss", "mask_example", "recipe_yaml", "curves")},
        "title": document["names"]["sft"],
        "tasks": tasks,
        "parameters": sft.model.num_parameters(),
        "weak": [p["id"] for p in document["prompts"] if p["kind"] == "open"],
        "settings": {k: plain_words.get(k, str(v)) for k, v in document["settings"].items()},
        "fingerprints": {
            **{k: data.get(k, v) for k, v in document["fingerprints"].items()},
            "prompts": document["prompt_set"]["sha256"][:16],
        },
        "generated": beside["now"],
        "seconds": {"train": beside["train_seconds"], "compare": document["seconds"]},
    }


def _nested(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(k, v) for k, v in values.items() if isinstance(v, dict)]
