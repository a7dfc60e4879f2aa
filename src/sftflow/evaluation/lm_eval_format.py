"""Results as users of EleutherAI's lm-evaluation-harness know them: the same keys and metric names in one JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.evaluation.options import How
from sftflow.evaluation.results import EvalResult

# Our figure -> the harness's "metric,filter". `score` is the task's own.
NAMES: dict[str, dict[str, str]] = {
    "gsm8k": {"strict": "exact_match,strict-match", "flexible": "exact_match,flexible-extract"},
    "humaneval": {"score": "pass@1,create_test"},
    "ifeval": {
        "prompt_strict": "prompt_level_strict_acc,none",
        "prompt_loose": "prompt_level_loose_acc,none",
        "instruction_strict": "inst_level_strict_acc,none",
        "instruction_loose": "inst_level_loose_acc,none",
    },
}


def harness_results(assistant: Assistant, results: Sequence[EvalResult]) -> dict[str, Any]:
    """One model's results: `results`, `n-samples`, `config` and what else the harness writes at the top level."""
    tasks = [r.task for r in results]
    how = results[0].how if results else How()
    return {
        "results": {r.task: {"alias": r.task, "sample_len": r.n, **figures(r)} for r in results},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {r.task: {"task": r.task, "num_fewshot": r.how.shots, "metadata": r.provenance} for r in results},
        "versions": {name: version("sftflow") for name in tasks},
        "n-shot": {r.task: r.how.shots for r in results},
        "higher_is_better": {r.task: {key.split(",")[0]: True for key in figures(r)} for r in results},
        "n-samples": {r.task: {"original": r.available or r.n, "effective": r.n} for r in results},
        "config": {
            "model": "sftflow",
            "model_args": f"pretrained={assistant.name}",
            "model_num_parameters": assistant.model.num_parameters(),
            "device": assistant.engine.runtime.device,
            "batch_size": assistant.engine.max_running,
            "limit": results[0].limit if results else None,
            "gen_kwargs": {"temperature": float(how.temperature), "do_sample": how.temperature > 0},
        },
        "date": datetime.now(UTC).timestamp(),
        "sftflow_version": version("sftflow"),
        "chat_template": assistant.renderer.format.template,
        "fewshot_as_multiturn": how.shots > 0,
        "model_name": assistant.name,
    }


def figures(result: EvalResult) -> dict[str, float]:
    """`exact_match,strict-match`, `exact_match_stderr,strict-match`, ... of one task."""
    names = NAMES.get(result.task.split("-")[0])
    if names is None:
        names = {"score": "acc,none" if result.chance else "exact_match,none"}
    out = {f"{name},create_test": share for name, share in result.pass_at.items()} if result.task == "humaneval" else {}
    for ours, theirs in names.items():
        value = result.score if ours == "score" else result.metrics.get(ours)
        if value is None:
            continue
        metric, kind = theirs.split(",")
        out[theirs] = value
        # Of a share of n rows; for the share of instructions, of which a row has several, the rows are the sample.
        spread = math.sqrt(value * (1 - value) / (result.n - 1)) if result.n > 1 else 0.0
        of_items = ours == "score" and result.how.samples > 1  # then a row is no sample of its own
        out[f"{metric}_stderr,{kind}"] = result.stderr if of_items else spread
    return out
