"""What a run is about to do, told before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sftflow.foundation.atomic_io import read_log
from sftflow.foundation.runtime import Runtime
from sftflow.recipe import Train
from sftflow.training.optimizers import groups_of
from sftflow.training.trainer import Trainer

RECENT = 20  # steps that the next ones are expected to be like


class Rate(NamedTuple):
    """A group of parameters and its peak learning rate, 0 where it is frozen."""

    group: str
    optimizer: str
    lr: float
    n_parameters: int


@dataclass(frozen=True, kw_only=True)
class Opening:
    """anew: whether it replaces another in `out`.   base: what is fine-tuned; None for a new one.
    rows, tokens: of one epoch, repeats included.   packed_rows: what these make.   step: the last one that is done.
    step_seconds: what a step took lately, None where none is done.   settings: resolved.   world: processes.
    supervised_text: those of plain text.   supervised_weight: the sum of the supervised tokens' weights, where one
    counts in part.   notes: how each `auto` was decided.
    """

    out: Path
    anew: bool
    base: str | None
    rows: int
    tokens: int
    supervised_tokens: int
    packed_rows: int
    held_out: int
    step: int
    steps: int
    epochs: float
    step_seconds: float | None
    rates: tuple[Rate, ...]
    n_parameters: int
    settings: Train
    runtime: Runtime
    world: int
    notes: Mapping[str, Any]
    supervised_weight: float | None = None
    supervised_text: int = 0

    @property
    def n_trained(self) -> int:
        """Parameters whose rate is above 0."""
        return sum(rate.n_parameters for rate in self.rates if rate.lr > 0)


def opening_of(trainer: Trainer, out: Path, facts: Mapping[str, Any]) -> Opening:
    """facts: what only the stage knows, by the names of an Opening's fields; else every token is supervised."""
    plan, tokens = trainer.plan, int(trainer.plan.lengths.sum())
    packed = plan.epoch_size(0)
    done = [row["seconds"] for row in read_log(out / "metrics.jsonl")[-RECENT:]] if trainer.step else []
    known = {"anew": False, "base": None, "supervised_tokens": tokens, "held_out": 0, "notes": {}, **facts}
    return Opening(
        out=out,
        rows=len(plan.examples),
        tokens=tokens,
        packed_rows=packed,
        step=trainer.step,
        steps=plan.total_steps,
        epochs=plan.total_steps * plan.rows_per_step / max(1, packed),
        step_seconds=median(done) if done else None,
        rates=tuple(_rates(trainer)),
        n_parameters=sum(p.numel() for p in trainer.model.parameters()),
        settings=trainer.settings,
        runtime=trainer.runtime,
        world=trainer.ranks.world,
        **known,
    )


def _rates(trainer: Trainer) -> list[Rate]:
    names = {id(p): name for name, group in groups_of(trainer.model).items() for p in group}
    return [
        Rate(
            names[id(group["params"][0])],
            type(optimizer).__name__,
            group["peak_lr"],
            sum(p.numel() for p in group["params"]),
        )
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]
