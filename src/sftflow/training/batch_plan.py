"""Which examples make which step, and what a step reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from sftflow.packing.pack import Example, PackedBatch, best_fit, pack_batch, pad_batch, split_padded, split_step
from sftflow.recipe import Train


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """One row of metrics.jsonl. loss: nats per supervised token. seconds: wall time of this step.

    tokens: real ones, padding not counted. computed_tokens: those that went through the layers (fewer, where
    conversations share their beginning). flops: floating-point work of the step's matrix products.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    padding_share: float
    computed_tokens: int = 0
    flops: float = 0.0
    source_loss: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


class RowPlan:
    """Which examples make which row of which step: a pure function of (examples, settings), so a resumed run needs
    only the step number. Each epoch is shuffled and packed anew with its own seed."""

    def __init__(self, examples: Sequence[Example], settings: Train) -> None:
        self.examples, self.settings = examples, settings
        self.rows_per_step = max(1, settings.tokens_per_step // settings.max_length)
        known: NDArray[np.int32] | None = getattr(examples, "lengths", None)  # rows on disk need not be read for them
        self.lengths = np.array([len(e.ids) for e in examples], np.int32) if known is None else known
        self.epoch_rows = lru_cache(2)(self._pack_epoch)  # packing a large set takes a while
        self.epoch_size = cache(lambda epoch: len(self.epoch_rows(epoch)))
        epochs = settings.epochs
        per_epoch = self.epoch_size(0) / self.rows_per_step
        wanted = [s for s in (settings.steps, None if epochs is None else math.ceil(per_epoch * epochs)) if s]
        self.total_steps = max(1, min(wanted)) if wanted else max(1, math.ceil(per_epoch))

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as numbers of examples; epochs differ by a few rows, each packed in its own order."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        order = rng.permutation(len(self.examples))
        packed = best_fit(self.lengths[order].tolist(), self.settings.max_length)
        rows = [[int(order[j]) for j in row] for row in packed]
        return [rows[i] for i in rng.permutation(len(rows))]  # best-fit orders by length; the model must not see that

    def step_rows(self, step: int) -> list[list[Example]]:
        """The packed rows of one step; a step may straddle two epochs."""
        wanted = self.rows_per_step
        out: list[list[Example]] = []
        at = step * wanted
        epoch = 0
        while at >= self.epoch_size(epoch):  # walked one by one, so that no row is lost or repeated
            at -= self.epoch_size(epoch)
            epoch += 1
        while len(out) < wanted:
            rows = self.epoch_rows(epoch)
            take = rows[at : at + wanted - len(out)]
            out += [[self.examples[i] for i in row] for row in take]
            epoch, at = epoch + 1, 0
            if step == self.total_steps - 1 and self.settings.epochs is not None and epoch >= self.settings.epochs:
                break  # the last step of the last epoch takes only what is left
        return out


def micro_batches(examples: Sequence[Example], settings: Train) -> list[PackedBatch]:
    """What the model computes at once: a step's examples in batches of `micro_tokens` slots, packed or padded.

    Equal beginnings are computed once, but not under dropout, which would strike all of them alike.
    """
    most = settings.micro_tokens or settings.tokens_per_step
    if not settings.packing:
        return [pad_batch(part) for part in split_padded(examples, most)]
    share = settings.share_prefixes and settings.dropout == 0
    return [pack_batch(part, share=share) for part in split_step(examples, most, share)]
