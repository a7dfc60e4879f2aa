"""The audit of a rendered mixture: lengths, repeated rows, nearly repeated rows, rows that quote an evaluation set.

`audit(sources, decode)` reads every row once, in chunks, and keeps about 110 bytes a row, so that a mixture larger
than memory can be audited. Everything is deterministic: no random draw, only fixed constants.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sftflow.data.audit.duplicates import Duplicates, duplicates
from sftflow.data.audit.lengths import length_edges, spread
from sftflow.data.audit.near_duplicates import BAND_ROWS, BANDS, NearDuplicates, minhash, near_duplicates, near_rows
from sftflow.data.audit.overlap import EvalIndex, Parts, TaskOverlap
from sftflow.data.audit.rows import AuditRows, Decode, Progress
from sftflow.data.store import Rows


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """lengths, supervised: tokens and supervised tokens of a row, as `spread` tells them. lengths["histogram"]: edges
    (b + 1,) and counts (b,), of rows with edges[i] <= tokens < edges[i + 1].   supervised["share"]: of all tokens.
    control_strings: of each control token that stands in contents, where it is text: how often ("times"), in how many
    "rows", and the "first" of them."""

    name: str
    rows: int
    lengths: dict[str, Any]
    supervised: dict[str, Any]
    duplicates: Duplicates
    near_duplicates: NearDuplicates
    control_strings: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("name", "rows")}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Of every source in the recipe's order, of all rows together, and of each evaluation task.

    Rows count once, whatever their source's `repeat`.
    """

    sources: tuple[SourceAudit, ...]
    overall: SourceAudit
    overlap: tuple[TaskOverlap, ...]

    def to_json(self) -> dict[str, Any]:
        found = {
            "sources": [s.to_json() for s in self.sources],
            **self.overall.to_json(),
            "overlap": {t.task: t.to_json() for t in self.overlap},
        }
        return json.loads(json.dumps(found))  # tuples become lists

    def into(self, ledger: Mapping[str, Any]) -> dict[str, Any]:
        """The ledger with the audit's keys beside its own. `ledger["sources"]` are the audited ones, in order."""
        found = self.to_json()
        sources = [{**old, **new} for old, new in zip(ledger["sources"], found.pop("sources"), strict=True)]
        return {**ledger, "sources": sources, **found}


def audit(
    sources: Sequence[Rows],
    decode: Decode,
    *,
    eval_sets: Mapping[str, Iterable[str | Parts]] | None = None,
    control: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Measure the rendered rows.

    decode: lists of ids -> texts, without special tokens.   eval_sets: task -> its items, each a text or its parts
    (question, answer); `item_parts` makes them.   control: the control tokens, and the id of each: one ends a word on
    both sides; a change of the mask does so in any case.   progress: called with (done, total).
    """
    rows = AuditRows(sources, decode, control or {})
    wanted = EvalIndex(eval_sets or {}, [s.name for s in sources])
    signatures = np.zeros((rows.n, BANDS * BAND_ROWS), np.uint8)
    worded = np.zeros(rows.n, bool)
    for chunk, words in rows.words(progress):
        signatures[chunk], worded[chunk] = minhash(words)
        wanted.search(words, rows, chunk)
    own = np.flatnonzero(worded & (rows.first == np.arange(rows.n)))
    near = near_rows(rows, own, signatures[own])

    edges = length_edges(rows.lengths)
    measured = tuple(
        _measure(rows, int(a), int(b), s.name, edges, near)
        for s, a, b in zip(sources, rows.start[:-1], rows.start[1:], strict=True)
    )
    overall = _measure(rows, 0, rows.n, "all", edges, near)
    return Audit(sources=measured, overall=overall, overlap=tuple(wanted.result()))


def _measure(
    rows: AuditRows, a: int, b: int, name: str, edges: tuple[int, ...], near: dict[int, tuple[int, float]]
) -> SourceAudit:
    """Rows a to b, all of one source or all there are."""
    lengths, supervised = rows.lengths[a:b], rows.supervised[a:b]
    counts, _ = np.histogram(np.maximum(lengths, 1), np.array([*edges[:-1], edges[-1] - 0.5]))
    tokens = int(lengths.sum(dtype=np.int64))
    return SourceAudit(
        name=name,
        rows=b - a,
        lengths={**spread(lengths), "histogram": {"edges": edges, "counts": tuple(counts.tolist())}},
        supervised={**spread(supervised), "share": round(int(supervised.sum(dtype=np.int64)) / max(1, tokens), 5)},
        duplicates=duplicates(rows, a, b),
        near_duplicates=near_duplicates(rows, a, b, near),
        control_strings=_control_strings(rows, a, b),
    )


def _control_strings(rows: AuditRows, a: int, b: int) -> dict[str, dict[str, Any]]:
    """Of rows a to b; the most frequent first."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(r for r in rows.strings if a <= r < b):
        n = int(rows.equal[row])
        for token, times in Counter(rows.strings[row]).items():
            entry = found.setdefault(token, {"times": 0, "rows": 0, "first": rows.place(row)})
            entry["times"] += n * times
            entry["rows"] += n
    return dict(sorted(found.items(), key=lambda item: -item[1]["times"]))
