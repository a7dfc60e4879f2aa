"""What lies beside the SFT checkpoint in its run directory, and what is measured with it: losses on rows that were held
out, forgetting, and the overlap of the tasks with the training rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.errors import SftflowError
from sftflow.evaluation.contamination import contamination_of_run
from sftflow.evaluation.heldout_loss import bits_per_byte, held_out_conversations, held_out_loss, plain_texts
from sftflow.evaluation.options import EvalTask

HELD_OUT_ROWS = 200


def held_out_and_overlap(
    base: Assistant, sft: Assistant, runs: Sequence[EvalTask], run: Path | None
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(held-out loss of both models, overlap by task). What cannot be had says why under `not_checked`."""
    if run is None or not (run / "recipe.yaml").is_file():
        why = {"not_checked": "the SFT checkpoint does not lie in a run directory"}
        return None, {r.name: why for r in runs}
    try:
        rows = held_out_conversations(run, HELD_OUT_ROWS)
        overlap = {name: found.to_json() for name, found in contamination_of_run(runs, run, sft.renderer).items()}
    except SftflowError as error:
        why = {"not_checked": f"{error.place}: {error.fact}"}
        return why, {r.name: why for r in runs}
    if not rows:
        return None, overlap
    try:
        losses = {"base": held_out_loss(base, rows).to_json(), "sft": held_out_loss(sft, rows).to_json()}
    except SftflowError as error:  # a model whose logits are not those of its head
        return {"not_checked": f"{error.place}: {error.fact}"}, overlap
    return {"rows": losses["sft"]["rows"], **losses}, overlap


def plain_text_loss(base: Assistant, sft: Assistant, file: Path | None) -> dict[str, Any]:
    """Bits per byte of plain text before and after: what SFT made the model forget of reading."""
    texts = plain_texts(file)
    try:
        before, after = bits_per_byte(base, texts), bits_per_byte(sft, texts)
    except SftflowError as error:
        return {"text": "", "bytes": 0, "base": None, "sft": None, "not_checked": f"{error.place}: {error.fact}"}
    return {
        "text": file.name if file else "the package's own sample",
        "bytes": after.bytes,
        "base": before.bpb,
        "sft": after.bpb,
    }


def beside_run(run: Path | None) -> dict[str, Any]:
    """Ledger, loss curve, recipe and a mask to show, None where they are not there."""
    found: dict[str, Any] = dict.fromkeys(("ledger", "loss", "mask_example", "recipe_yaml", "train_seconds", "curves"))
    found["now"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if run is None:
        return found
    found["ledger"] = _read_json(run / "ledger.json")
    examples = _read_json(run / "mask_example.json")
    found["mask_example"] = max(examples, key=_interest) if examples else None
    steps = _read_lines(run / "metrics.jsonl")
    if steps:
        found["loss"] = {
            "step": [r["step"] for r in steps],
            "loss": [r["loss"] for r in steps],
            "validation": _read_lines(run / "validation.jsonl"),
        }
        found["train_seconds"] = sum(r["seconds"] for r in steps)
    found["curves"] = _read_lines(run / "evals.jsonl") or None
    recipe = run / "recipe.yaml"
    found["recipe_yaml"] = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return found


def _interest(example: dict[str, Any]) -> tuple[int, int]:
    """The mask example worth showing: one with a calculator call, of moderate length."""
    tokens = example["tokens"]
    has_tool = any(t["special"] and "output" in t["text"] for t in tokens)
    return (int(has_tool), -abs(len(tokens) - 60))


def _read_json(path: Path) -> Any:
    """None where there is no such file, or it is not whole: what it would show is left out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """A log's rows; a line that a kill or a full disk cut short is none."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
