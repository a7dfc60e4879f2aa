"""What is measured beside the tasks: losses on held-out rows and on plain text, overlap of the tasks with what was
trained on. What cannot be measured says why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftflow.checkpoint import Assistant
from sftflow.comparison.results import Forgetting, HeldOutComparison, HeldOutLoss, NotChecked, Overlap
from sftflow.errors import SftflowError
from sftflow.evaluation.contamination import contamination
from sftflow.evaluation.heldout_loss import bits_per_byte, held_out_loss, held_out_rows, plain_texts, run_mixture
from sftflow.evaluation.prompts_for import TaskRun
from sftflow.recipe import load_recipe

HELD_OUT_ROWS = 200
HeldOut = HeldOutComparison | NotChecked | None


def held_out_and_overlap(
    base: Assistant, sft: Assistant, runs: Sequence[TaskRun], run: Path | None
) -> tuple[HeldOut, Mapping[str, Overlap | NotChecked]]:
    """(held-out loss of both models, overlap by task). What cannot be had says why under `not_checked`."""
    if run is None or not (run / "recipe.yaml").is_file():
        why = NotChecked(not_checked="the SFT checkpoint does not lie in a run directory")
        return None, {r.name: why for r in runs}
    try:
        recipe = load_recipe(run / "recipe.yaml")
        ledger = json.loads((run / "ledger.json").read_text(encoding="utf-8"))
        mixture = run_mixture(recipe, sft.renderer, digest=ledger.get("data_sha256"))
        rows = held_out_rows(mixture, recipe, HELD_OUT_ROWS)
        found = contamination(runs, mixture.rows, mixture.renderer) if runs else {}
    except SftflowError as error:
        why = _why(error)
        return why, {r.name: why for r in runs}
    overlap = {task: Overlap(**figures) for task, figures in found.items()}
    if not rows:
        return None, overlap
    try:
        before, after = (HeldOutLoss(**held_out_loss(model, rows)) for model in (base, sft))
    except SftflowError as error:  # a model whose logits are not those of its head
        return _why(error), overlap
    return HeldOutComparison(rows=after.rows, base=before, sft=after), overlap


def forgetting(base: Assistant, sft: Assistant, file: Path | None) -> Forgetting:
    """Bits per byte of plain text before and after: what SFT made the model forget of reading. None: of our sample."""
    texts = plain_texts(file)
    try:
        before, after = bits_per_byte(base, texts), bits_per_byte(sft, texts)
    except SftflowError as error:
        return Forgetting(text="", bytes=0, base=None, sft=None, not_checked=_why(error).not_checked)
    return Forgetting(
        text=file.name if file else "the package's own sample",
        bytes=after["bytes"],
        base=before["bpb"],
        sft=after["bpb"],
    )


def _why(error: SftflowError) -> NotChecked:
    return NotChecked(not_checked=f"{error.place}: {error.fact}")
