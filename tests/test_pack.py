"""Packing: nothing lost, nothing crossed, positions restart, targets shifted once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftflow.mixture.pack import IGNORE, Example, best_fit, pack_batch


def example(ids: list[int], mask: list[int]) -> Example:
    return Example(ids=np.array(ids), mask=np.array(mask, np.int8))


def test_worked_example() -> None:
    batch = pack_batch([[example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])]], 6)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.targets.tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE]]
    assert (batch.n_supervised, batch.n_tokens) == (3, 5)


@given(st.lists(st.integers(1, 40), max_size=200))
def test_best_fit_loses_nothing_and_fits(lengths: list[int]) -> None:
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # best-fit decreasing never leaves two rows that are both at most half full
    assert sum(sum(lengths[i] for i in row) <= 20 for row in rows) <= 1


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2**12 - 1)), min_size=1, max_size=20))
def test_targets_are_the_supervised_next_tokens(items: list[tuple[int, int]]) -> None:
    examples = [example(list(range(1, n + 1)), [bits >> i & 1 for i in range(n)]) for n, bits in items]
    rows = best_fit([len(e.ids) for e in examples], 16)
    batch = pack_batch([[examples[i] for i in row] for row in rows], 16)
    assert batch.n_supervised == sum(int(e.mask[1:].sum()) for e in examples)
    for ids, targets, segments in zip(batch.input_ids, batch.targets, batch.segments, strict=True):
        for at in np.flatnonzero(targets != IGNORE):
            assert segments[at] == segments[at + 1] > 0 and targets[at] == ids[at + 1]
