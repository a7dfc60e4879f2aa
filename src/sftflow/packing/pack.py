"""Packing: which conversations share a row of fixed length (a step is so many rows), and what the model computes.

    conversations      [s s a b c]  [s s d e]  [f g]      s s: the same beginning
    slots               s s a b  d  f  .                  the last token predicts nothing: it is not an input
    positions           0 1 2 3  2  0  0                  restart in every conversation
    segments            (0 1 2 3) (0 1 4) (5)              the slots of each conversation, in order
    label_positions     3 4 5                              the slots whose next id is supervised
    labels              c e g                              that id

A causal model's state at a token depends on nothing but the tokens before it, so conversations that begin alike share
the slots of that beginning: computed once, with the sum of everyone's gradient. Targets are shifted here and nowhere
else; a conversation ends with its last supervised token, since nothing after it is predicted.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sftflow.foundation.sequences import common_prefix

PAD_TO = 128
"""slots of a packed row come in multiples of this, so that kernels and memory blocks are used again"""
Int = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sequence.

    ids: (n,) token ids.   mask: (n,) 1 where the token is supervised (a thing the model must produce).
    source: index of the mixture source, for the per-source loss.   weights: (n,) what each token's loss is multiplied
    by, 0 where the mask is 0; None where that is the mask.
    """

    ids: Int
    mask: NDArray[np.int8]
    source: int = 0
    weights: NDArray[np.float64] | None = None

    @property
    def weight(self) -> float:
        """The sum of the weights of what is supervised: a number of tokens, where none counts in part."""
        return len(label_positions_of(self)) if self.weights is None else float(self.weights[1:].sum())


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What the model computes in one forward pass: slots, most often one row of them.

    The last slot of a packed row belongs to no conversation, nor do those before it that fill the row up.
    """

    input_ids: Int
    """(rows, width) token ids; 0 in padding (padding is told by `segments`, never by id)"""
    positions: Int
    """(rows, width) position inside the own conversation, from 0"""
    segments: list[Int]
    """for each conversation the slots of its tokens in order, (n,) indices into the flattened rows"""
    n_own: list[int]
    """for each conversation how many of its last slots are its own, and not shared with an earlier one"""
    label_positions: Int
    """(m,) the slots whose output is read; a slot may be read several times"""
    labels: Int
    """(m,) the id that must follow each of these slots"""
    sources: Int
    """(m,) the mixture source of each"""
    weights: NDArray[np.float64] | None = None
    """(m,) what the loss of each is multiplied by; None: 1"""

    @property
    def n_supervised(self) -> int:
        return len(self.labels)

    @property
    def n_computed(self) -> int:
        """Slots that hold a token."""
        return sum(self.n_own)

    def previous_ids(self, before: int = -1) -> Int:
        """(rows, width) the id before each slot's in its conversation; `before` where a conversation begins."""
        ids = self.input_ids.ravel()
        previous = np.full(ids.size, before)
        for path in self.segments:
            previous[path[1:]] = ids[path[:-1]]
        return previous.reshape(self.input_ids.shape)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: each item goes to the fullest row that still takes it.

    Rows come back in the order in which they were opened, items of a row in their original order.

    >>> best_fit([5, 3, 2], 8)
    [[0, 1], [2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free slots: the numbers of rows, a heap
    rooms: list[int] = []  # the free slots that some row has, ascending
    for item in order:
        need = lengths[item]
        if need > capacity:
            raise ValueError(f"item {item} has {need} tokens, more than the row's {capacity}")
        at = bisect.bisect_left(rooms, need)
        if at == len(rooms):
            rows.append([item])
            room, row = capacity - need, len(rows) - 1
        else:
            room = rooms[at]
            row = heapq.heappop(open_rows[room])
            if not open_rows[room]:
                del rooms[at]
            rows[row].append(item)
            room -= need
        if room > 0:
            if not open_rows[room]:
                bisect.insort(rooms, room)
            heapq.heappush(open_rows[room], row)
    for row_items in rows:
        row_items.sort()
    return rows


def label_positions_of(example: Example) -> Int:
    """(m,) positions whose next token is supervised."""
    return np.flatnonzero(np.asarray(example.mask)[1:] == 1)


def inputs_of(example: Example) -> Int:
    """The ids that must be computed: all before the last supervised one; none where nothing is supervised."""
    label_positions = label_positions_of(example)
    return np.asarray(example.ids[: label_positions[-1] + 1 if len(label_positions) else 0], np.int64)


def by_beginning(examples: Sequence[Example]) -> list[Example]:
    """The examples in the order of their inputs, so that each shares most with the one before it."""
    return sorted(examples, key=lambda e: inputs_of(e).astype(">i8").tobytes())


def split_step(
    examples: Sequence[Example], micro_tokens: int, share: bool = True, multiple: int = 1
) -> list[list[Example]]:
    """Cut a step into micro-batches of at most `micro_tokens` computed slots each, about equally full; into a multiple
    of `multiple` of them, where that can be.

    Where beginnings are shared, attention still gathers every conversation whole; four times `micro_tokens` of that
    is the most a micro-batch gets. A longer conversation stands alone.
    """
    ordered = by_beginning(examples) if share else list(examples)
    inputs = [inputs_of(e) for e in ordered]
    shared = [0, *(common_prefix(a, b) for a, b in pairwise(inputs))] if share else [0] * len(inputs)
    total = sum(len(i) - s for i, s in zip(inputs, shared, strict=True))
    parts = multiple * max(1, -(-total // (micro_tokens * multiple)))
    aim = -(-total // parts)
    out: list[list[Example]] = []
    slots = gathered = micro_tokens * 5
    for example, ids, known in zip(ordered, inputs, shared, strict=True):
        if not len(ids):
            continue
        own = len(ids) - known
        over = slots + own > micro_tokens or gathered + len(ids) > 4 * micro_tokens
        if over or (slots >= aim and len(out) < parts):
            out.append([])
            slots = gathered = 0
            own = len(ids)
        out[-1].append(example)
        slots, gathered = slots + own, gathered + len(ids)
    return out


def split_padded(examples: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """The same for one example a row: rows of similar length, rows * width at most `micro_tokens`."""
    wanted = sorted((e for e in examples if len(label_positions_of(e))), key=lambda e: -len(inputs_of(e)))
    out: list[list[Example]] = []
    width = 0
    for example in wanted:
        if not out or (len(out[-1]) + 1) * width > micro_tokens:
            out.append([])
            width = len(inputs_of(example))
        out[-1].append(example)
    return out


def pack_batch(examples: Sequence[Example], *, share: bool = True, multiple: int = PAD_TO) -> PackedBatch:
    """One row of all the examples' slots, filled up to a multiple of `multiple` with at least one free slot."""
    ordered = by_beginning(examples) if share else list(examples)
    ids: list[Int] = []
    positions: list[Int] = []
    segments: list[Int] = []
    n_own: list[int] = []
    before: Int = np.zeros(0, np.int64)
    path: Int = np.zeros(0, np.int64)
    at = 0
    for example in ordered:
        mine = inputs_of(example)
        known = common_prefix(before, mine) if share else 0
        fresh = len(mine) - known
        path = np.concatenate([path[:known], np.arange(at, at + fresh)])
        ids.append(mine[known:])
        positions.append(np.arange(known, len(mine)))
        segments.append(path)
        n_own.append(fresh)
        before, at = mine, at + fresh
    filling = np.zeros(multiple - at % multiple, np.int64)
    row, places = (np.concatenate([*x, filling])[None] for x in (ids, positions))
    return _batch(ordered, row, places, segments, n_own)


def pad_batch(examples: Sequence[Example]) -> PackedBatch:
    """One example a row, right-padded: for models that cannot keep packed conversations apart."""
    inputs = [inputs_of(e) for e in examples]
    width = max(len(i) for i in inputs)
    ids = np.zeros((len(inputs), width), np.int64)
    for row, mine in zip(ids, inputs, strict=True):
        row[: len(mine)] = mine
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    segments = [np.arange(len(mine)) + row * width for row, mine in enumerate(inputs)]
    return _batch(examples, ids, positions, segments, [len(i) for i in inputs])


def _batch(examples: Sequence[Example], ids: Int, positions: Int, segments: list[Int], n_own: list[int]) -> PackedBatch:
    asked = [label_positions_of(e) for e in examples]

    def joined(parts: Iterable[Int]) -> Int:
        return np.concatenate([np.zeros(0, np.int64), *parts])

    weights = None
    if any(e.weights is not None for e in examples):
        taught = ((e.mask if e.weights is None else e.weights)[at + 1] for e, at in zip(examples, asked, strict=True))
        weights = np.concatenate([np.zeros(0), *taught])
    return PackedBatch(
        weights=weights,
        input_ids=ids,
        positions=positions,
        segments=segments,
        n_own=n_own,
        label_positions=joined(path[at] for path, at in zip(segments, asked, strict=True)),
        labels=joined(np.asarray(e.ids)[at + 1] for e, at in zip(examples, asked, strict=True)),
        sources=joined(np.full(len(at), e.source) for e, at in zip(examples, asked, strict=True)),
    )
