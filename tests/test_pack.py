"""Packing: nothing lost, nothing crossed, positions restart, targets shifted once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftflow.packing.pack import (
    Example,
    best_fit,
    by_beginning,
    label_positions_of,
    pack_batch,
    pad_batch,
    split_padded,
    split_step,
)


def example(ids: list[int], mask: list[int]) -> Example:
    return Example(ids=np.array(ids), mask=np.array(mask, np.int8))


def test_worked_example() -> None:
    s, a, b, c, d, e, f, g = range(1, 9)
    rows = [example([s, s, a, b, c], [0, 0, 0, 0, 1]), example([s, s, d, e], [0, 0, 0, 1]), example([f, g], [0, 1])]
    batch = pack_batch(rows, multiple=8)
    assert batch.input_ids.tolist() == [[s, s, a, b, d, f, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0]]
    assert [p.tolist() for p in batch.segments] == [[0, 1, 2, 3], [0, 1, 4], [5]]
    assert batch.n_own == [4, 1, 1]
    assert (batch.label_positions.tolist(), batch.labels.tolist()) == ([3, 4, 5], [c, e, g])
    assert (batch.n_supervised, batch.n_computed) == (3, 6)


@given(st.lists(st.integers(1, 40), max_size=200))
def test_best_fit_loses_nothing_and_fits(lengths: list[int]) -> None:
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # best-fit decreasing never leaves two rows that are both at most half full
    assert sum(sum(lengths[i] for i in row) <= 20 for row in rows) <= 1


ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 2**12 - 1)), min_size=1, max_size=20
)


@given(ROWS, st.booleans())
def test_every_path_spells_its_conversation(items: list[tuple[list[int], int]], share: bool) -> None:
    """Along its path a conversation reads its own ids at its own positions, and asks for its supervised ids."""
    examples = [example(ids, [bits >> i & 1 for i in range(len(ids))]) for ids, bits in items]
    for part in split_step(examples, 24, share):
        batch = pack_batch(part, share=share, multiple=8)
        ids, positions = batch.input_ids[0], batch.positions[0]
        assert len(ids) % 8 == 0 and batch.n_computed < len(ids)
        assert sorted(np.unique(np.concatenate(batch.segments))) == list(range(batch.n_computed))
        wanted = []
        for e, path in zip(by_beginning(part) if share else part, batch.segments, strict=True):
            assert ids[path].tolist() == e.ids[: len(path)].tolist()
            assert positions[path].tolist() == list(range(len(path)))
            wanted += [int(t) for t, m in zip(e.ids[1:], e.mask[1:], strict=True) if m]
        assert batch.labels.tolist() == wanted
        if share:  # no two slots stand for the same beginning
            seen = {
                tuple(e.ids[: i + 1])
                for e, p in zip(by_beginning(part), batch.segments, strict=True)
                for i in range(len(p))
            }
            assert len(seen) == batch.n_computed


@given(ROWS, st.booleans())
def test_a_step_is_cut_into_batches_that_fit_and_lose_nothing(items: list[tuple[list[int], int]], share: bool) -> None:
    examples = [example(ids, [bits >> i & 1 for i in range(len(ids))]) for ids, bits in items]
    parts = split_step(examples, 24, share)
    asked = [e for e in examples if len(label_positions_of(e))]
    assert sorted(id(e) for part in parts for e in part) == sorted(map(id, asked))
    assert all(pack_batch(p, share=share).n_computed <= 24 for p in parts)
    padded = split_padded(examples, 24)
    assert sorted(id(e) for part in padded for e in part) == sorted(map(id, asked))
    assert all(pad_batch(p).input_ids.size <= 24 for p in padded)
