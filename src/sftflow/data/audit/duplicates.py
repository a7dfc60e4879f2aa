"""Rows with the same ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sftflow.data.audit.rows import EXAMPLES, AuditRows


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows with the same ids: how many, and the places of the first of them."""

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


def duplicates(rows: AuditRows, a: int, b: int) -> Duplicates:
    """Of rows a to b."""
    first = rows.first
    mine = first[a:b]
    copies = np.flatnonzero(mine != np.arange(a, b)) + a
    size = np.bincount(first, minlength=1)
    groups = np.unique(mine[size[mine] > 1])
    biggest = groups[np.lexsort((groups, -size[groups]))][:EXAMPLES]
    return Duplicates(
        rows=len(copies),
        of_other_sources=rows.elsewhere(copies, first[copies]),
        groups=len(groups),
        examples=tuple(
            Group(rows=int(size[g]), places=tuple(rows.place(int(r)) for r in np.flatnonzero(first == g)[:3]))
            for g in biggest
        ),
    )
