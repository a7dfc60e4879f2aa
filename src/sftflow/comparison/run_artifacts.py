"""What lies beside the SFT checkpoint in its run directory: how it was trained, for whoever reads the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.chat.token_rows import TokenRow
from sftflow.foundation.atomic_io import read_log


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """None or empty: the run has none, or its file is not whole.

    ledger: ledger.json.   losses: (step, nats per supervised token).   validation: the rows of validation.jsonl, the
    loss on the held-out rows after a step, by source too where these can be told apart.   sampled: the rows of
    evals.jsonl, scores and rates of the reply checks on a sample of the tasks after a step.   mask_example: a training
    row with its mask.   recipe: as YAML.
    """

    ledger: Mapping[str, Any] | None = None
    losses: Sequence[tuple[int, float | None]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    sampled: Sequence[Mapping[str, Any]] = ()
    mask_example: TokenRow | None = None
    recipe: str | None = None
    train_seconds: float | None = None


def run_of(model: str) -> Path | None:
    """The run directory that a model's checkpoint lies in, where it does: RUN or RUN/checkpoint, trained by us."""
    directory = Path(model)
    run = directory.parent if directory.name == "checkpoint" else directory
    trained = (run / "checkpoint").is_dir() and (run / "recipe.yaml").is_file() and (run / "ledger.json").is_file()
    return run if trained else None


def read_run(run: Path | None) -> RunArtifacts:
    """What the files of a run directory say; nothing where there is none."""
    if run is None:
        return RunArtifacts()
    examples = [TokenRow.from_json(row) for row in _read_json(run / "mask_example.json") or ()]
    steps = read_log(run / "metrics.jsonl")
    recipe = run / "recipe.yaml"
    return RunArtifacts(
        ledger=_read_json(run / "ledger.json"),
        losses=[(r["step"], r["loss"]) for r in steps],
        validation=read_log(run / "validation.jsonl"),
        sampled=read_log(run / "evals.jsonl"),
        mask_example=max(examples, key=_interest, default=None),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        train_seconds=sum(r["seconds"] for r in steps) if steps else None,
    )


def _interest(row: TokenRow) -> tuple[bool, int]:
    """The mask example worth showing: one with a calculator call, of moderate length."""
    return any(t.special and "output" in t.text for t in row.tokens), -abs(len(row.tokens) - 60)


def _read_json(path: Path) -> Any:
    """None where there is no such file, or it is not whole: what it would show is left out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
