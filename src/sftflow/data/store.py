"""Rendered rows on disk: written once, front to back, and read through memory maps.

ids.bin    int32   the ids of all rows, one after another
mask.bin   int8    1 where supervised
rows.npy   a table with a line a row (ROW)
weights.npy  only where some tokens count in part: a table with a line for each stretch of them (SPAN)
meta.json  what became of the source's rows, the bad ones, and the first that was rendered
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.files.names import Places
from sftflow.packing.pack import Example

ROW = np.dtype(
    [
        ("start", "<i8"),  # index of its first token in ids.bin
        ("length", "<i4"),  # tokens
        ("supervised", "<i4"),  # supervised tokens, the first one never among them: nothing predicts it
        ("number", "<i4"),  # line or row number in the source, from 1
        ("digest", "<u8"),  # of its ids: equal rows have equal ones
        ("text", "?"),  # whether it is plain text, or a piece of it
    ]
)

SPAN = np.dtype([("row", "<i8"), ("start", "<i4"), ("end", "<i4"), ("weight", "<f8")])
"""supervised tokens `start` to `end` of a row, whose loss is multiplied by a weight between 0 and 1"""
NO_SPANS = np.empty(0, SPAN)


def spans_of(row: int, mask: NDArray[np.int8], weights: NDArray[np.float64]) -> list[tuple[int, int, int, float]]:
    """The stretches of a row's tokens that count in part, as lines of SPAN.

    >>> spans_of(7, np.array([0, 1, 1, 1], np.int8), np.array([0, 0.5, 0.5, 1]))
    [(7, 1, 3, 0.5)]
    """
    changes = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [(row, a, b, float(weights[a])) for a, b in pairwise(changes) if a < b and mask[a] and weights[a] != 1]


class RowWriter:
    """Appends blocks of rows to a new store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ids = (directory / "ids.bin").open("wb")
        self._mask = (directory / "mask.bin").open("wb")
        self._tables: list[NDArray[Any]] = [np.empty(0, ROW)]
        self._spans: list[NDArray[Any]] = []
        self._rows = self._tokens = 0

    def append(
        self, ids: NDArray[np.int32], mask: NDArray[np.int8], table: NDArray[Any], spans: NDArray[Any] = NO_SPANS
    ) -> None:
        """table: of ROW, whose `start` counts from the beginning of these ids.   spans: of SPAN, whose `row` counts
        from the first of these rows."""
        table = table.copy()
        table["start"] += self._tokens
        self._tables.append(table)
        if len(spans):
            spans = spans.copy()
            spans["row"] += self._rows
            self._spans.append(spans)
        self._rows += len(table)
        self._tokens += len(ids)
        self._ids.write(ids.tobytes())
        self._mask.write(mask.tobytes())

    def close(self) -> None:
        """Close the files; without `finish` the store is not whole."""
        self._ids.close()
        self._mask.close()

    def finish(self, meta: dict[str, Any]) -> None:
        self.close()
        np.save(self._directory / "rows.npy", np.concatenate(self._tables))
        if self._spans:
            np.save(self._directory / "weights.npy", np.concatenate(self._spans))
        (self._directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


class Rows:
    """The rendered rows of one source.

    table: (rows,) of ROW.   ids, masks: those of all rows, one after another.   spans: (n,) of SPAN, by row.   number:
    index of the source in the mixture.   prefix: what a row's number is put behind, e.g. "data.jsonl".   files: of a
    source of several files, (the number before its first row, file) of each.
    """

    def __init__(
        self,
        table: NDArray[Any],
        ids: NDArray[Any],
        masks: NDArray[np.int8],
        spans: NDArray[Any] = NO_SPANS,
        *,
        name: str,
        number: int,
        prefix: str,
        files: Sequence[tuple[int, str]] = (),
    ) -> None:
        self.spans, self._span_rows = spans, np.ascontiguousarray(spans["row"])
        self.table, self.all_ids, self.all_masks = table, ids, masks
        self.text: NDArray[np.bool_] = table["text"]
        self.lengths: NDArray[np.int32] = table["length"]
        self.supervised: NDArray[np.int32] = table["supervised"]
        self.name, self.number, self.prefix = name, number, prefix
        self.places = Places([(first, file) for first, file in files] or [(0, prefix)])

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, i: int) -> NDArray[np.int32]:
        return self.all_ids[self._span(i)].astype(np.int32, copy=False)

    def mask(self, i: int) -> NDArray[np.int8]:
        return self.all_masks[self._span(i)]

    def weights(self, i: int) -> NDArray[np.float64] | None:
        """(n,) what each token's loss is multiplied by; None where that is the mask."""
        first, last = np.searchsorted(self._span_rows, [i, i + 1])
        if first == last:
            return None
        weights = self.mask(i).astype(np.float64)
        for _, start, end, weight in self.spans[first:last].tolist():
            weights[start:end] = weight
        return weights

    @cached_property
    def weight_sums(self) -> NDArray[np.float64]:
        """(rows,) the sum of each row's weights: its supervised tokens, where none counts in part."""
        sums = self.supervised.astype(np.float64)
        lost = (self.spans["end"] - self.spans["start"]) * (1 - self.spans["weight"])
        np.subtract.at(sums, self._span_rows, lost)
        return sums

    def _span(self, i: int) -> slice:
        start = int(self.table["start"][i])
        return slice(start, start + int(self.lengths[i]))

    def only(self, kept: NDArray[np.bool_]) -> Rows:
        """Some of the rows.   kept: (rows,) which."""
        table = self.table[kept]
        name, number, prefix, files = self.name, self.number, self.prefix, self.places.files
        return Rows(table, self.all_ids, self.all_masks, name=name, number=number, prefix=prefix, files=files)

    def place(self, i: int) -> str:
        """Where the row comes from, e.g. data.jsonl:17."""
        return self.places[int(self.table["number"][i])]

    def example(self, i: int) -> Example:
        weights = self.weights(i) if len(self.spans) else None
        return Example(
            ids=self.ids(i).astype(np.int64), mask=np.asarray(self.mask(i)), source=self.number, weights=weights
        )


class RowStore(Rows):
    """The rows of one source on disk.   new: they were put into the cache just now."""

    def __init__(self, directory: Path, *, name: str, number: int, prefix: str, new: bool = False) -> None:
        self.directory, self.new = directory, new
        self.meta: dict[str, Any] = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        ids, masks = _mapped(directory / "ids.bin", np.int32), _mapped(directory / "mask.bin", np.int8)
        files = self.meta["files"] if len(self.meta["files"]) > 1 or prefix.startswith("hub:") else ()
        rows = np.load(directory / "rows.npy")
        super().__init__(rows, ids, masks, read_spans(directory), name=name, number=number, prefix=prefix, files=files)


def read_spans(directory: Path) -> NDArray[Any]:
    """The lines of SPAN of a store, or of a part of one."""
    file = directory / "weights.npy"
    return np.load(file) if file.is_file() else NO_SPANS  # type: ignore[no-any-return]


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class Examples(Sequence[Example]):
    """Some rows of several sources, each possibly more than once, as a sequence of training examples.

    index: (n, 2) of source number and row.
    """

    def __init__(self, sources: Sequence[RowStore], index: NDArray[np.int32]) -> None:
        self._sources, self.chosen = sources, index
        self.lengths = np.empty(len(index), np.int32)
        for number, source in enumerate(sources):
            chosen = index[:, 0] == number
            self.lengths[chosen] = source.lengths[index[chosen, 1]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Examples(self._sources, self.chosen[i])
        source, row = self.chosen[i]
        return self._sources[source].example(int(row))
