"""Which examples make which step, and what a step reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.foundation.ranks import Ranks, dealt
from sftflow.packing.pack import (
    Example,
    PackedBatch,
    best_fit,
    inputs_of,
    pack_batch,
    pad_batch,
    split_padded,
    split_step,
)
from sftflow.recipe import Train

ALONE = Ranks()


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """One row of metrics.jsonl. loss: nats per supervised token. seconds: wall time of this step.   supervised_weight:
    the sum of the tokens' weights, by which the loss is divided, where one counts in part.

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
    supervised_weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class RowPlan:
    """Which examples make which row of which step: a pure function of (examples, settings), so a resumed run needs
    only the step number. Each epoch is shuffled and packed anew with its own seed.

    listed: source after source, in the order of their numbers, each shuffled. A packed row then holds rows of one
    source, and only a step in which a source ends also has rows of the next.
    """

    def __init__(self, examples: Sequence[Example], settings: Train, *, listed: bool = False) -> None:
        self.examples, self.settings = examples, settings
        chosen: NDArray[np.int32] | None = getattr(examples, "chosen", None) if listed else None
        self.sources = np.zeros(len(examples), np.int64)
        if listed:
            self.sources += [e.source for e in examples] if chosen is None else chosen[:, 0]
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
        out: list[list[int]] = []
        for source in np.unique(self.sources):
            own = order[self.sources[order] == source]
            packed = best_fit(self.lengths[own].tolist(), self.settings.max_length)
            rows = [[int(own[j]) for j in row] for row in packed]
            out += [rows[i] for i in rng.permutation(len(rows))]  # best-fit orders by length, which is not to be seen
        return out

    def unreached(self) -> list[int]:
        """The numbers of the sources that no step comes to, where the last step is before the first epoch's end."""
        if not self.sources.any():
            return []
        rows = self.epoch_rows(0)[: self.total_steps * self.rows_per_step]
        return sorted(set(self.sources.tolist()) - {int(self.sources[i]) for row in rows for i in row})

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


def micro_batches(
    examples: Sequence[Example], settings: Train, ranks: Ranks = ALONE, *, even: bool = False
) -> list[PackedBatch]:
    """What the model computes at once on this rank: its share of the examples in batches of `micro_tokens` slots,
    packed or padded.

    Equal beginnings are computed once, but not under dropout, which would strike all of them alike. Who computes what
    hangs on the examples and the number of ranks alone; every example is on exactly one of them.   even: as many
    batches as every other rank, the last ones perhaps without a label: where each is a collective.
    """
    most = settings.micro_tokens or settings.tokens_per_step
    dropout = settings.dropout or (settings.lora and settings.lora.dropout)
    share = settings.packing and settings.share_prefixes and not dropout
    if settings.packing:
        parts = split_step(examples, most, share, ranks.world)
    else:
        parts = split_padded(examples, _share_of(examples, most, ranks.world))
    mine = dealt([sum(len(inputs_of(e)) for e in part) for part in parts], ranks.world)
    batches = [pack_batch(parts[i], share=share) if settings.packing else pad_batch(parts[i]) for i in mine[ranks.rank]]
    idle = max(len(each) for each in mine) - len(batches) if even else 0
    return batches + [without_labels(settings.packing)] * idle


def _share_of(examples: Sequence[Example], most: int, world: int) -> int:
    """Slots of a padded batch: few enough that there is one for each rank."""
    return most if world == 1 else min(most, -(-sum(len(inputs_of(e)) for e in examples) // world))


def without_labels(packed: bool) -> PackedBatch:
    """The smallest batch: nothing of it is supervised."""
    example = Example(ids=np.zeros(2, np.int64), mask=np.ones(2, np.int8))
    batch = pack_batch([example]) if packed else pad_batch([example])
    nothing = np.zeros(0, np.int64)
    return replace(batch, label_positions=nothing, labels=nothing, sources=nothing)


def weight_of(examples: Sequence[Example]) -> float:
    """What the sum of their losses is divided by: the sum of the weights of all supervised tokens, 1 where there is
    none."""
    return sum(e.weight for e in examples) or 1


class Tally:
    """What a step, or a validation, adds up over batches and ranks.

    loss: nats per supervised token, each counted by its weight.   computed: tokens that went through the layers, of
    `slots`.
    """

    def __init__(self, examples: Sequence[Example], n_sources: int = 0) -> None:
        """examples: of all ranks.   n_sources: at least so many are told apart."""
        self.size = max([n_sources, *(e.source + 1 for e in examples)])
        self.sums, self.counts, self.weights = np.zeros(self.size), np.zeros(self.size), np.zeros(self.size)
        self.n = np.zeros(2)

    def add(self, batch: PackedBatch, losses: torch.Tensor) -> None:
        """losses: (n,) of the batch's supervised tokens."""
        nats, weights = losses.cpu().double().numpy(), batch.weights
        self.sums += np.bincount(batch.sources, nats if weights is None else nats * weights, self.size)
        self.counts += np.bincount(batch.sources, minlength=self.size)
        self.weights += np.bincount(batch.sources, weights, self.size)
        if batch.n_supervised:
            self.n += (batch.n_computed, batch.input_ids.size)

    def over_ranks(self, ranks: Ranks) -> None:
        """Add up all ranks' sums, so that each has the same."""
        whole = ranks.total(np.concatenate([self.sums, self.counts, self.weights, self.n]))
        self.sums, self.counts, self.weights, self.n = np.split(whole, [self.size, 2 * self.size, 3 * self.size])

    @property
    def loss(self) -> float:
        return float(self.sums.sum() / (self.weights.sum() or 1))

    @property
    def weight(self) -> float | None:
        """The sum of the weights, as it is reported; None where it is the number of supervised tokens."""
        return None if np.array_equal(self.weights, self.counts) else round(float(self.weights.sum()), 6)

    @property
    def supervised(self) -> int:
        return int(self.counts.sum())

    @property
    def computed(self) -> int:
        return int(self.n[0])

    @property
    def slots(self) -> int:
        return int(self.n[1])

    def by_source(self) -> list[float | None]:
        """The loss of each source, None where it has no token here."""
        return [float(s / w) if w else None for s, w in zip(self.sums, self.weights, strict=True)]
