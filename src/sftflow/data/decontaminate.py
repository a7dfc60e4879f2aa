"""`decontaminate: drop`: which rows overlap with the evaluation tasks, by the audit's rules (`audit/overlap.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.render import Renderer
from sftflow.data.audit.overlap import EvalIndex, Parts
from sftflow.data.audit.rows import AuditRows
from sftflow.data.store import Rows

EvalSets = Mapping[str, Sequence[Parts]]
"""the parts of each item (`item_parts`) of each task"""


def overlapping(sources: Sequence[Rows], renderer: Renderer, eval_sets: EvalSets) -> list[NDArray[np.bool_]]:
    """For each source (rows, tasks): whether a row, or another example of its conversation, has an item of a task."""
    decode = renderer.tokenizer.backend_tokenizer.decode_batch
    rows = AuditRows(sources, lambda ids: decode(ids, skip_special_tokens=True), renderer.special)
    index = EvalIndex(eval_sets, [source.name for source in sources])
    found = np.zeros((rows.n, len(eval_sets)), bool)
    for chunk, words in rows.words():  # of equal rows the first
        found[chunk] = index.rows_of_tasks(words)
    parts = zip(sources, (found[a:b] for a, b in pairwise(rows.start)), strict=True)
    return [_any_of(source.table["number"], _any_of(source.table["digest"], part)) for source, part in parts]


def _any_of(group: NDArray[np.int32] | NDArray[np.uint64], found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is true of one row, for all rows of its group.

    >>> _any_of(np.array([7, 8, 7], np.int32), np.array([[True], [False], [False]])).ravel()
    array([ True, False,  True])
    """
    _, number = np.unique(group, return_inverse=True)
    out = np.zeros_like(found)
    np.logical_or.at(out, number, found)
    return out[number]
