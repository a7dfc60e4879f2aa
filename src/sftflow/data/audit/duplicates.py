"""AuditRows with the same ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftflow.data.audit.ngrams import Hashes, Index
from sftflow.data.audit.rows import EXAMPLES, AuditRows
from sftflow.fingerprint import row_digest


@dataclass(frozen=True, kw_only=True)
class Group:
    """AuditRows with the same ids: how many, and the places of the first of them."""

    rows: int
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """rows: that repeat an earlier row, here or in an earlier source.   of_other_sources: of these, the rows whose
    first copy is in an earlier source.   groups: sets of equal rows that touch this source.   examples: the biggest."""

    rows: int = 0
    of_other_sources: int = 0
    groups: int = 0
    examples: tuple[Group, ...] = ()


def digests_of(rows: AuditRows) -> Hashes:
    """(n,) `row_digest` of each row."""
    return np.array([row_digest(source.ids(i)) for source in rows.sources for i in range(len(source))], np.uint64)


def first_copies(rows: AuditRows, digests: Hashes) -> tuple[Index, NDArray[np.bool_]]:
    """(n,) the first row with the same ids; (n,) whether a row repeats an earlier one of its own source."""
    _, begin, group = np.unique(digests, return_index=True, return_inverse=True)
    first = begin[group].astype(np.int64)
    here = np.zeros(rows.n, bool)
    for a, b in zip(rows.start[:-1], rows.start[1:], strict=True):
        _, begin = np.unique(digests[a:b], return_index=True)
        here[a:b] = True
        here[a + begin] = False
    return first, here


def duplicates(rows: AuditRows, a: int, b: int, first: Index) -> Duplicates:
    mine = first[a:b]
    copies = np.flatnonzero(mine != np.arange(a, b)) + a
    size = np.bincount(first, minlength=1)
    groups = np.unique(mine[size[mine] > 1])
    biggest = groups[np.lexsort((groups, -size[groups]))][:EXAMPLES]
    return Duplicates(
        rows=len(copies),
        of_other_sources=rows.elsewhere(list(zip(copies.tolist(), first[copies].tolist(), strict=True))),
        groups=len(groups),
        examples=tuple(
            Group(rows=int(size[g]), places=tuple(rows.place(int(r)) for r in np.flatnonzero(first == g)[:3]))
            for g in biggest
        ),
    )
