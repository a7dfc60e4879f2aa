"""All sources' rendered rows under one numbering, with their words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sftflow.data.audit.ngrams import Index, Words, split_words
from sftflow.data.store import ROW, Rows

Ids = NDArray[np.int32]
Decode = Callable[[list[list[int]]], list[str]]
Progress = Callable[[int, int], None]  # (done, total)

CHUNK_TOKENS = 1 << 16  # read and decoded at once: their hashes stay in the processor's cache
EXAMPLES = 5  # of each finding, in the ledger


class AuditRows:
    """All sources' rows.

    start (sources + 1,): the first row of each source.   lengths, supervised (n,): tokens and supervised tokens of each
    row.   first (n,): the first row with the same ids, which may be the row itself.   copies (n,): whether a row
    repeats an earlier one of its own source.   equal (n,): of one that does not, how many equal rows its source has,
    itself among them.   strings: of each row that `words` has read, the control tokens that
    stand in it as text, where there are any.
    """

    def __init__(self, sources: Sequence[Rows], decode: Decode, control: Mapping[str, int]) -> None:
        """control: the control tokens, and the id of each."""
        self.sources, self.decode = sources, decode
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.strings: dict[int, list[str]] = {}
        self.start: Index = np.concatenate([[0], np.cumsum([len(s) for s in sources])]).astype(np.int64)
        self.n = int(self.start[-1])
        table = np.concatenate([np.zeros(0, ROW), *(s.table for s in sources)])
        self.lengths: Ids = table["length"]
        self.supervised: Ids = table["supervised"]
        _, begin, group = np.unique(table["digest"], return_index=True, return_inverse=True)
        self.first: Index = begin[group].astype(np.int64)
        self.copies = np.ones(self.n, bool)
        self.equal = np.zeros(self.n, np.int64)
        for a, b in pairwise(self.start):
            _, own, counts = np.unique(table["digest"][a:b], return_index=True, return_counts=True)
            self.copies[a + own], self.equal[a + own] = False, counts
        self.special = np.zeros(max(control.values(), default=-1) + 1, bool)
        self.special[list(control.values())] = True

    def source_of(self, rows: Index) -> Index:
        return np.searchsorted(self.start, rows, side="right").astype(np.int64) - 1

    def find(self, row: int) -> tuple[Rows, int]:
        s = int(self.source_of(np.array(row)))
        return self.sources[s], row - int(self.start[s])

    def place(self, row: int) -> str:
        source, i = self.find(row)
        return source.place(i)

    def elsewhere(self, rows: Index, earlier: Index) -> int:
        """How many of the rows are of another source than the earlier row that each repeats."""
        return int((self.source_of(rows) != self.source_of(earlier)).sum())

    def chunks(self, rows: Index) -> Iterator[Index]:
        """`rows` in order, cut so that a chunk has at most CHUNK_TOKENS tokens (a longer row is a chunk of its own)."""
        ends = np.cumsum(self.lengths[rows], dtype=np.int64)
        begin = 0
        while begin < len(rows):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right")))
            yield rows[begin:end]
            begin = end

    def words(self, progress: Progress | None = None) -> Iterator[tuple[Index, Words]]:
        """Chunks of rows with their words; of equal rows of one source only the first, as the others have nothing new
        to say. (A row that repeats another source's may still be that source's only overlap.)"""
        wanted = np.flatnonzero(~self.copies)
        done = 0
        for chunk in self.chunks(wanted):
            texts = self.texts(chunk)
            found = {int(r): self._control.findall(text) for r, text in zip(chunk, texts, strict=True)}
            self.strings |= {row: strings for row, strings in found.items() if strings}
            yield chunk, split_words(texts)
            done += len(chunk)
            if progress:
                progress(done, len(wanted))

    def texts(self, rows: Index) -> list[str]:
        """The text of each row, what is prompt and what is reply on lines of their own.

        A row decoded at once would glue a question's last word to the reply's first, where only special tokens stand
        between them.
        """
        found = [self.find(int(r)) for r in rows]
        ids = np.concatenate([s.ids(i) for s, i in found])
        mask = np.concatenate([s.mask(i) for s, i in found])
        row = np.repeat(np.arange(len(rows)), self.lengths[rows])
        starts = np.cumsum([0, *self.lengths[rows][:-1]])
        several = starts[self.lengths[rows] > 1]
        mask[several] = mask[several + 1]  # nothing predicts a row's first token: it parts no words
        cut = np.ones(len(ids), bool)
        cut[1:] = (mask[1:] != mask[:-1]) | (row[1:] != row[:-1])
        special = np.zeros(len(ids), bool)
        if len(self.special):
            known = ids < len(self.special)
            special[known] = self.special[ids[known]]
            cut |= special
            cut[1:] |= special[:-1]
        begin = np.flatnonzero(cut)
        end = np.append(begin[1:], len(ids))
        begin, end = begin[~special[begin]], end[~special[begin]]
        flat = ids.tolist()
        pieces = self.decode([flat[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)])
        bounds = np.searchsorted(row[begin], np.arange(len(rows) + 1)).tolist()
        return ["\n".join(pieces[a:b]) for a, b in pairwise(bounds)]
