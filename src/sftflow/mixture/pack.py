"""Best-fit packing of rendered conversations into rows of fixed length.

    conversations   [a a a a a] [b b b] [c c]          length 8
    row ids          a a a a a b b b   |  c c . . . . . .
    segments         1 1 1 1 1 2 2 2   |  1 1 0 0 0 0 0 0      0 is padding
    positions        0 1 2 3 4 0 1 2   |  0 1 0 0 0 0 0 0      restart in every conversation
    targets          the NEXT id where that next id is supervised, else -100; never across conversations

Targets are shifted here and nowhere else.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
Int = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sequence.

    ids: (n,) token ids.   mask: (n,) 1 where the token is supervised (a thing the model must produce).
    source: index of the mixture source, for the per-source loss.
    """

    ids: Int
    mask: NDArray[np.int8]
    source: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What the model sees in one forward pass; every array has shape (rows, length)."""

    input_ids: Int
    """token ids; 0 in padding (padding is told by `segments`, never by id)"""
    targets: Int
    """the id that must follow each position, or -100 where nothing is asked"""
    positions: Int
    """position inside the own conversation, from 0"""
    segments: Int
    """1, 2, ... numbers the conversations of a row in order; 0 is padding"""
    sources: Int
    """the mixture source of each position; meaningless in padding"""
    n_supervised: int
    """number of targets that are not -100"""

    @property
    def n_tokens(self) -> int:
        return int((self.segments > 0).sum())


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """(n,) tokens of each example; rows on disk know them without being read."""
    known: NDArray[np.int32] | None = getattr(examples, "lengths", None)
    return np.array([len(e.ids) for e in examples], np.int32) if known is None else known


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


def pack_row(examples: Sequence[Example], length: int) -> tuple[Int, Int, Int, Int, Int]:
    """One row of (input_ids, targets, positions, segments, sources), each of shape (length,)."""
    ids, positions, segments, sources = (np.zeros(length, np.int64) for _ in range(4))
    targets = np.full(length, IGNORE, np.int64)
    at = 0
    for number, example in enumerate(examples, 1):
        n = len(example.ids)
        end = at + n
        ids[at:end] = example.ids
        positions[at:end] = np.arange(n)
        segments[at:end] = number
        sources[at:end] = example.source
        targets[at : end - 1] = np.where(example.mask[1:] == 1, example.ids[1:], IGNORE)
        at = end
    return ids, targets, positions, segments, sources


def pack_batch(rows: Sequence[Sequence[Example]], length: int) -> PackedBatch:
    """Stack packed rows into one batch of shape (len(rows), length)."""
    columns = [np.stack(c) for c in zip(*(pack_row(row, length) for row in rows), strict=True)]
    ids, targets, positions, segments, sources = columns
    return PackedBatch(
        input_ids=ids,
        targets=targets,
        positions=positions,
        segments=segments,
        sources=sources,
        n_supervised=int((targets != IGNORE).sum()),
    )


def padding_share(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of slots that hold no token."""
    slots = len(rows) * capacity
    return 1 - sum(lengths) / slots if slots else 0.0
