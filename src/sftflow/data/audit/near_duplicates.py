"""Rows that nearly repeat an earlier one: MinHash (Broder 1997), banded, and the true similarity of what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sftflow.data.audit.ngrams import CHAR, Index, Words, mix64, split_words
from sftflow.data.audit.rows import EXAMPLES, AuditRows

SIMILAR = 0.8  # Jaccard similarity from which two rows are near-duplicates
# 20 bands of 5 minima: a pair of similarity s shares a band with probability 1 - (1 - s^5)^20 (Leskovec, Rajaraman,
# Ullman, "Mining of Massive Datasets", 3.4): 0.470 at s = 0.5, 0.975 at 0.7, 0.9996 at 0.8, 1 - 1e-8 at 0.9.
BANDS, BAND_ROWS = 20, 5
# Of the 100 minima of a pair at s = 0.8, fewer than 65 agree once in 6,000 times: such pairs aren't read again.
AGREE = 65
BACK = 3  # a row is compared with this many rows before it in its bucket, and with the bucket's first
TRIES = 3  # of a row's candidates, those that agree most are read and compared by text


@dataclass(frozen=True, kw_only=True)
class Near:
    """A row and the earlier one it nearly repeats. similarity: Jaccard, of their sets of 5-word shingles."""

    place: str
    of: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """rows: that nearly repeat an earlier one. Exact repeats are not among them: the two counts add up."""

    rows: int = 0
    of_other_sources: int = 0
    examples: tuple[Near, ...] = ()


@cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(100,) words to xor and (100,) odd words to multiply with: 100 orders of the 32-bit hashes."""
    n = BANDS * BAND_ROWS
    drawn = mix64(np.arange(1, 2 * n + 1, dtype=np.uint64) * np.uint64(CHAR)) >> np.uint64(32)
    return drawn[:n].astype(np.uint32), drawn[n:].astype(np.uint32) | np.uint32(1)


def minhash(words: Words) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(n, 100) for each text and each of 100 orders, which of its shingles comes first; (n,) whether it has any.

    Two texts agree at a place with probability s, their Jaccard similarity. Of the winning hash only 8 bits are kept
    (Li, Koenig 2010, "b-bit minwise hashing"), so that s becomes s + (1 - s) / 256.
    """
    hashes, start = words.shingles()
    some = np.diff(start) > 0
    out = np.zeros((len(some), BANDS * BAND_ROWS), np.uint8)
    if some.any():
        short = (hashes >> np.uint64(32)).astype(np.uint32)
        work, begin = np.empty_like(short), start[:-1][some]
        minima = np.empty((BANDS * BAND_ROWS, len(begin)), np.uint8)
        for k, (xor, factor) in enumerate(zip(*_permutations(), strict=True)):
            np.bitwise_xor(short, xor, out=work)
            np.multiply(work, factor, out=work)
            # The low bits: the high ones of a minimum are always near 0.
            minima[k] = np.minimum.reduceat(work, begin) & np.uint32(255)
        out[some] = minima.T
    return out, some


def candidates(signatures: NDArray[np.uint8]) -> tuple[Index, Index]:
    """Pairs (later, earlier) of rows that share a band and agree at 65 places of 100, by row, the likeliest first.

    Only a few neighbours in a bucket are looked at, so that rows of one template cannot make a quadratic number.
    """
    n = len(signatures)
    pairs, agreed = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for band in range(BANDS):
        part = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]
        key = np.zeros(n, np.uint64)
        for column in part.T:
            key = (key << np.uint64(8)) | column
        order = np.argsort(key, kind="stable")
        key = key[order]
        at = np.arange(n)
        new = np.ones(n, bool)
        new[1:] = key[1:] != key[:-1]
        head = np.maximum.accumulate(np.where(new, at, 0))
        depth = at - head
        found, agree = [pairs], [agreed]
        for back in range(1, BACK + 2):
            here = np.flatnonzero(depth >= back)
            before = here - back if back <= BACK else head[here]
            for block in range(0, len(here), 1 << 15):
                later, earlier = order[here[block : block + (1 << 15)]], order[before[block : block + (1 << 15)]]
                same = np.count_nonzero(signatures[later] == signatures[earlier], axis=1)
                found.append((later * n + earlier)[same >= AGREE])
                agree.append(same[same >= AGREE])
        pairs, index = np.unique(np.concatenate(found), return_index=True)
        agreed = np.concatenate(agree)[index]
    pairs = pairs[np.lexsort((pairs, -agreed, pairs // max(1, n)))]
    return pairs // max(1, n), pairs % max(1, n)


def near_rows(rows: AuditRows, own: Index, signatures: NDArray[np.uint8]) -> dict[int, tuple[int, float]]:
    """Row -> an earlier row whose true similarity is at least 0.8, and that similarity; in the order of the rows.

    own: the rows to look at.   signatures (len(own), 100): theirs.
    """
    later, earlier = candidates(signatures)
    new = np.ones(len(later), bool)
    new[1:] = later[1:] != later[:-1]
    rank = np.arange(len(later)) - np.maximum.accumulate(np.where(new, np.arange(len(later)), 0))
    found: dict[int, tuple[int, float]] = {}
    resolved = np.zeros(len(own), bool)
    for attempt in range(TRIES):
        open_ = np.flatnonzero((rank == attempt) & ~resolved[later])
        for block in range(0, len(open_), 256):
            a, b = later[open_[block : block + 256]], earlier[open_[block : block + 256]]
            sets = _shingle_sets(rows, own[np.unique(np.concatenate([a, b]))])
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                alike = jaccard(sets[int(own[i])], sets[int(own[j])])
                if alike >= SIMILAR:
                    found[int(own[i])] = int(own[j]), alike
                    resolved[i] = True
    return dict(sorted(found.items()))


def _shingle_sets(rows: AuditRows, wanted: Index) -> dict[int, set[int]]:
    out = {}
    for chunk in rows.chunks(wanted):
        hashes, start = split_words(rows.texts(chunk)).shingles()
        flat = hashes.tolist()
        for row, a, b in zip(chunk.tolist(), start[:-1].tolist(), start[1:].tolist(), strict=True):
            out[row] = set(flat[a:b])
    return out


def jaccard(a: set[int], b: set[int]) -> float:
    """
    >>> jaccard({1, 2, 3}, {2, 3, 4})
    0.5
    """
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


def near_duplicates(rows: AuditRows, a: int, b: int, near: dict[int, tuple[int, float]]) -> NearDuplicates:
    """Of rows a to b. near: what `near_rows` found."""
    later = np.array([row for row in near if a <= row < b], np.int64)
    earlier = np.array([near[row][0] for row in later.tolist()], np.int64)
    first = zip(later[:EXAMPLES].tolist(), earlier.tolist(), strict=False)
    return NearDuplicates(
        rows=len(later),
        of_other_sources=rows.elsewhere(later, earlier),
        examples=tuple(
            Near(place=rows.place(row), of=rows.place(of), similarity=round(near[row][1], 4)) for row, of in first
        ),
    )
