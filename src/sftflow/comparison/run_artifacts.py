"""What lies beside the SFT checkpoint in its run directory: how it was trained, for whoever reads the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sftflow.chat.token_rows import TokenRow
from sftflow.foundation.atomic_io import read_log


@dataclass(frozen=True, kw_only=True)
class LedgerSource:
    """What a source of the mixture gave. cut, dropped: conversations that were too long."""

    name: str
    rows: int
    repeat: float
    tokens: int
    supervised_tokens: int
    cut: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What was trained on. padding_share: of the packed rows' tokens."""

    sources: tuple[LedgerSource, ...]
    rows: int
    tokens: int
    supervised_tokens: int
    packed_rows: int
    padding_share: float


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Loss on the held-out rows after a step; by source where these can be told apart."""

    step: int
    loss: float | None
    sources: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class SampledScores:
    """Scores, and rates of the reply checks, on a sample of the tasks after a step."""

    step: int
    tasks: Mapping[str, float | None]
    hygiene: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """None or empty: the run has none, or its file is not whole.

    losses: (step, nats per supervised token).   mask_example: a training row with its mask.   recipe: as YAML.
    """

    ledger: Ledger | None = None
    losses: Sequence[tuple[int, float | None]] = ()
    validation: Sequence[ValidationLoss] = ()
    sampled: Sequence[SampledScores] = ()
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
        ledger=_ledger(_read_json(run / "ledger.json")),
        losses=[(r["step"], r["loss"]) for r in steps],
        validation=[
            ValidationLoss(step=r["step"], loss=r["loss"], sources=r.get("sources") or {})
            for r in read_log(run / "validation.jsonl")
        ],
        sampled=[
            SampledScores(step=r["step"], tasks=r.get("tasks") or {}, hygiene=r.get("hygiene") or {})
            for r in read_log(run / "evals.jsonl")
        ],
        mask_example=max(examples, key=_interest, default=None),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        train_seconds=sum(r["seconds"] for r in steps) if steps else None,
    )


def _ledger(told: Any) -> Ledger | None:
    if not told:
        return None
    own = [f.name for f in fields(Ledger) if f.name != "sources"]
    keys = [f.name for f in fields(LedgerSource)]
    sources = tuple(LedgerSource(**{k: s[k] for k in keys}) for s in told["sources"])
    return Ledger(sources=sources, **{k: told[k] for k in own})


def _interest(row: TokenRow) -> tuple[bool, int]:
    """The mask example worth showing: one with a calculator call, of moderate length."""
    return any(t.special and "output" in t.text for t in row.tokens), -abs(len(row.tokens) - 60)


def _read_json(path: Path) -> Any:
    """None where there is no such file, or it is not whole: what it would show is left out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
