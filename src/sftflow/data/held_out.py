"""Which conversations of a source are held out from training."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def n_wanted(n: int, validation: float) -> int:
    """How many of n examples are asked for: a share below 1, a count from 1 on."""
    if validation <= 0 or n == 0:
        return 0
    return int(validation) if validation >= 1 else max(1, round(n * validation))


def split_held_out(
    digests: NDArray[np.uint64], numbers: NDArray[np.int32], validation: float, seed: str
) -> NDArray[np.bool_]:
    """Which examples of a source leave training: whole conversations, equal ones together, and at most half of all. One
    of their examples may occur in a conversation that stays; it is then not to be counted as held out.

    digests: of each example's ids.   numbers: the row of each, those of one row one after another.
    """
    n = len(digests)
    held = np.zeros(n, bool)
    wanted = min(n_wanted(n, validation), n // 2)
    if not wanted:
        return held
    order = list(range(n))
    random.Random(seed).shuffle(order)
    group = _equal_conversations(digests, numbers)
    sizes = np.bincount(group)
    n_held = 0
    for i in order:
        if n_held >= wanted:
            break
        size = int(sizes[group[i]])
        if not held[i] and n_held + size <= n // 2:  # never the whole source, however often its rows repeat
            held[i if size == 1 else group == group[i]] = True
            n_held += size
    return held


def _equal_conversations(digests: NDArray[np.uint64], numbers: NDArray[np.int32]) -> NDArray[np.int64]:
    """(n,) the group of each example: those of the rows that have the same examples in the same order, by number.

    >>> digests, numbers = np.array([7, 8, 7, 8, 7], np.uint64), np.array([1, 1, 2, 2, 3], np.int32)
    >>> _equal_conversations(digests, numbers)
    array([0, 0, 0, 0, 1])
    """
    starts = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    if len(starts) + 1 == len(digests):  # an example a row
        return np.unique(digests, return_inverse=True)[1]
    known: dict[bytes, int] = {}
    rows = np.split(digests, starts)
    return np.repeat([known.setdefault(row.tobytes(), len(known)) for row in rows], [len(row) for row in rows])


def told_fewer(n_held: int, n_apart: int, wanted: int) -> str:
    """What is to be said where less than half of the examples asked for are held out: "" where there is nothing.
    n_apart: how many left training."""
    if 2 * n_held >= wanted:
        return ""
    why = (
        "equal rows stay on one side, and no more than half of a source is taken"
        if 2 * n_apart < wanted
        else "the others are trained on in other rows, too"
    )
    one = wanted == 1
    return f"{n_held:,} of the {wanted:,} row{'s' * (not one)} asked for {'is' if one else 'are'} held out: {why}"
