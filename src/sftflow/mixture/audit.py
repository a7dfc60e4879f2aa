"""The audit of a rendered mixture: lengths, repeated rows, nearly repeated rows, rows that quote an evaluation set.

`audit(sources, decode)` reads every row once, in chunks, and keeps about 110 bytes a row, so that a mixture larger
than memory can be audited. Everything is deterministic: no random draw, only fixed constants.

Text is compared by words: lower-cased letters, digits and marks; all else separates. A character of a script written
without spaces (Chinese, Japanese, Thai ...) is a word of its own. Words and n-grams are compared by 64-bit hashes; a
reported overlap is checked again by its text.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftflow.mixture.tasks import Item

Ids = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Index = NDArray[np.int64]
Decode = Callable[[list[list[int]]], list[str]]
Progress = Callable[[str, int, int], None]
Parts = Sequence[str]

CHUNK_TOKENS = 1 << 16  # read and decoded at once: their hashes stay in the processor's cache
QUANTILES = (5, 25, 50, 75, 95, 99)
# Lengths are counted on the ISO 3 series R10, ten bins a decade: a source of 20 tokens and one of 2,000 both show.
STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
EXAMPLES = 5  # of each finding, in the ledger

SHINGLE = 5  # words
SIMILAR = 0.8  # Jaccard similarity from which two rows are near-duplicates
# 20 bands of 5 minima: a pair of similarity s shares a band with probability 1 - (1 - s^5)^20 (Leskovec, Rajaraman,
# Ullman, "Mining of Massive Datasets", 3.4): 0.470 at s = 0.5, 0.975 at 0.7, 0.9996 at 0.8, 1 - 1e-8 at 0.9.
BANDS, BAND_ROWS = 20, 5
# Of the 100 minima of a pair at s = 0.8, fewer than 65 agree once in 6,000 times: such pairs aren't read again.
AGREE = 65
BACK = 3  # a row is compared with this many rows before it in its bucket, and with the bucket's first
TRIES = 3  # of a row's candidates, those that agree most are read and compared by text

NGRAM = 13  # words (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C)
MIN_WORDS = 4  # a shorter item would be found in any text
TEMPLATE_ITEMS = 10


class SourceRows(Protocol):
    """The rendered rows of one source. lengths, supervised: (n,) tokens and supervised tokens of each row."""

    @property
    def name(self) -> str: ...
    @property
    def lengths(self) -> Ids: ...
    @property
    def supervised(self) -> Ids: ...
    def __len__(self) -> int: ...
    def ids(self, i: int) -> Ids: ...
    def mask(self, i: int) -> NDArray[np.int8]: ...
    def place(self, i: int) -> str: ...


# ---- what the audit says


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of token counts over rows. Quantiles are values that occur (the inverse of the empirical distribution)."""

    min: int = 0
    p5: int = 0
    p25: int = 0
    p50: int = 0
    p75: int = 0
    p95: int = 0
    p99: int = 0
    max: int = 0
    mean: float = 0.0


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


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """edges (b + 1,), counts (b,): rows with edges[i] <= tokens < edges[i + 1].   share: supervised of all tokens."""

    name: str
    rows: int
    lengths: Spread
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    supervised: Spread
    share: float
    duplicates: Duplicates
    near_duplicates: NearDuplicates

    def to_json(self) -> dict[str, Any]:
        return {
            "lengths": {**asdict(self.lengths), "histogram": {"edges": list(self.edges), "counts": list(self.counts)}},
            "supervised": {**asdict(self.supervised), "share": self.share},
            "duplicates": plain(asdict(self.duplicates)),
            "near_duplicates": plain(asdict(self.near_duplicates)),
        }


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A training row that has words of an evaluation item. item: its number in the set, from 0."""

    item: int
    source: str
    place: str
    words: str


@dataclass(frozen=True, kw_only=True)
class TaskOverlap:
    """Evaluation items found in training rows.

    items: of the task.   unchecked: items of fewer than 4 words, or with template wording only.   contaminated: items
    found.   share: of all items.   template_ngrams: left out as template wording.   sources: items found, by source.
    """

    task: str
    items: int
    unchecked: int
    contaminated: int
    share: float
    template_ngrams: int
    sources: tuple[tuple[str, int], ...]
    examples: tuple[Shared, ...]

    def to_json(self) -> dict[str, Any]:
        out = {k: v for k, v in asdict(self).items() if k != "task"}
        found = [{"name": name, "items": n, "share": round(n / max(1, self.items), 5)} for name, n in self.sources]
        return plain({"ngram": NGRAM, **out, "sources": found})


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Of every source in the recipe's order, of all rows together, and of each evaluation task.

    Rows count once, whatever their source's `repeat`.
    """

    sources: tuple[SourceAudit, ...]
    overall: SourceAudit
    overlap: tuple[TaskOverlap, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "sources": [s.to_json() for s in self.sources],
            **self.overall.to_json(),
            "overlap": {t.task: t.to_json() for t in self.overlap},
        }

    def into(self, ledger: Mapping[str, Any]) -> dict[str, Any]:
        """The ledger with the audit's keys beside its own. `ledger["sources"]` are the audited ones, in order."""
        found = self.to_json()
        sources = [{**old, **new} for old, new in zip(ledger["sources"], found.pop("sources"), strict=True)]
        return {**ledger, "sources": sources, **found}


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON reads them back."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def item_parts(item: Item) -> tuple[str, ...]:
    """An evaluation item as the overlap reads it: what is asked, and the answer where it is a text of its own."""
    asked = "\n\n".join(m.text for m in item.messages)
    return (asked, item.answer) if isinstance(item.answer, str) and not item.choices else (asked,)


def audit(
    sources: Sequence[SourceRows],
    decode: Decode,
    *,
    eval_sets: Mapping[str, Iterable[str | Parts]] | None = None,
    special_ids: Collection[int] = (),
    progress: Progress | None = None,
) -> Audit:
    """Measure the rendered rows.

    decode: lists of ids -> texts, without special tokens.   eval_sets: task -> its items, each a text or its parts
    (question, answer); `item_parts` makes them.   special_ids: ids that end a word on both sides, as the role markers
    do; a change of the mask does so in any case.   progress: called with (stage, done, total).
    """
    rows = _Rows(sources, decode, special_ids)
    say = progress or (lambda stage, done, total: None)
    digests = _digests(rows)
    first, repeats_here = _first_copies(rows, digests)
    wanted = EvalIndex(eval_sets or {}, [s.name for s in sources])
    signatures = np.zeros((rows.n, BANDS * BAND_ROWS), np.uint8)
    worded = np.zeros(rows.n, bool)
    # A row that repeats one of its own source has nothing new to say; one that repeats another source's row may still
    # be that source's only overlap.
    todo = np.flatnonzero(~repeats_here)
    done = 0
    for chunk in rows.chunks(todo):
        found = split_words(rows.texts(chunk))
        signatures[chunk], worded[chunk] = minhash(found)
        wanted.search(found, rows, chunk)
        done += len(chunk)
        say("audit", done, len(todo))
    own = np.flatnonzero(worded & (first == np.arange(rows.n)))
    near = _near_duplicates(rows, own, signatures[own])

    edges = length_edges(rows.lengths)
    measured = tuple(
        _measure(rows, int(a), int(b), s.name, edges, first, near)
        for s, a, b in zip(sources, rows.start[:-1], rows.start[1:], strict=True)
    )
    overall = _measure(rows, 0, rows.n, "all", edges, first, near)
    return Audit(sources=measured, overall=overall, overlap=tuple(wanted.result()))


# ---- rows


class _Rows:
    """All sources' rows under one numbering.

    start (sources + 1,): the first row of each source.   lengths (n,): tokens of each row.
    """

    def __init__(self, sources: Sequence[SourceRows], decode: Decode, special_ids: Collection[int]) -> None:
        self.sources, self.decode = sources, decode
        self.start: Index = np.concatenate([[0], np.cumsum([len(s) for s in sources])]).astype(np.int64)
        self.n = int(self.start[-1])
        none = np.zeros(0, np.int32)
        self.lengths: Ids = np.concatenate([none, *(s.lengths for s in sources)])
        self.supervised: Ids = np.concatenate([none, *(s.supervised for s in sources)])
        self.special = np.zeros(max(special_ids, default=-1) + 1, bool)
        self.special[list(special_ids)] = True

    def source_of(self, rows: Index) -> Index:
        return np.searchsorted(self.start, rows, side="right").astype(np.int64) - 1

    def find(self, row: int) -> tuple[SourceRows, int]:
        s = int(np.searchsorted(self.start, row, side="right")) - 1
        return self.sources[s], row - int(self.start[s])

    def place(self, row: int) -> str:
        source, i = self.find(row)
        return source.place(i)

    def chunks(self, rows: Index) -> Iterator[Index]:
        """`rows` in order, cut so that a chunk has at most CHUNK_TOKENS tokens (a longer row is a chunk of its own)."""
        ends = np.cumsum(self.lengths[rows], dtype=np.int64)
        begin = 0
        while begin < len(rows):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right")))
            yield rows[begin:end]
            begin = end

    def texts(self, rows: Index) -> list[str]:
        """The text of each row, what is prompt and what is reply on lines of their own.

        A row decoded at once would glue a question's last word to the reply's first, where only special tokens stand
        between them.
        """
        found = [self.find(int(r)) for r in rows]
        ids = np.concatenate([s.ids(i) for s, i in found])
        mask = np.concatenate([s.mask(i) for s, i in found])
        row = np.repeat(np.arange(len(rows)), self.lengths[rows])
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


# ---- lengths


def spread(values: Ids) -> Spread:
    """
    >>> spread(np.arange(1, 101, dtype=np.int32))
    Spread(min=1, p5=5, p25=25, p50=50, p75=75, p95=95, p99=99, max=100, mean=50.5)
    """
    if not len(values):
        return Spread()
    at = np.percentile(values, QUANTILES, method="inverted_cdf")
    quantiles = {f"p{q}": int(v) for q, v in zip(QUANTILES, at, strict=True)}
    mean = round(float(values.mean(dtype=np.float64)), 2)
    return Spread(min=int(values.min()), max=int(values.max()), mean=mean, **quantiles)


def length_edges(lengths: Ids) -> tuple[int, ...]:
    """Bin edges around all lengths, one set for every source, so that their histograms share an axis.

    >>> length_edges(np.array([11, 47]))
    (10, 13, 16, 20, 25, 32, 40, 50)
    """
    if not len(lengths):
        return (1, 2)
    low, high = max(1, int(lengths.min())), max(1, int(lengths.max()))
    every = sorted({int(step * 10**decade + 0.5) for decade in range(len(str(high)) + 1) for step in STEPS})
    begin = max(i for i, edge in enumerate(every) if edge <= low)
    end = min(i for i, edge in enumerate(every) if edge > high)
    return tuple(every[begin : end + 1])


def _measure(
    rows: _Rows, a: int, b: int, name: str, edges: tuple[int, ...], first: Index, near: dict[int, tuple[int, float]]
) -> SourceAudit:
    """Rows a to b, all of one source or all there are."""
    lengths, supervised = rows.lengths[a:b], rows.supervised[a:b]
    counts, _ = np.histogram(np.maximum(lengths, 1), np.array([*edges[:-1], edges[-1] - 0.5]))
    tokens = int(lengths.sum(dtype=np.int64))
    found = [(row, *near[row]) for row in near if a <= row < b]
    return SourceAudit(
        name=name,
        rows=b - a,
        lengths=spread(lengths),
        edges=edges,
        counts=tuple(int(c) for c in counts),
        supervised=spread(supervised),
        share=round(int(supervised.sum(dtype=np.int64)) / max(1, tokens), 5),
        duplicates=_duplicates(rows, a, b, first),
        near_duplicates=NearDuplicates(
            rows=len(found),
            of_other_sources=_elsewhere(rows, [(row, of) for row, of, _ in found]),
            examples=tuple(
                Near(place=rows.place(row), of=rows.place(of), similarity=round(alike, 4))
                for row, of, alike in found[:EXAMPLES]
            ),
        ),
    )


# ---- exact duplicates


def _digests(rows: _Rows) -> Hashes:
    """(n,) BLAKE2b of each row's ids, cut to 64 bits: among a million rows, two differing ones meet once in 37
    million mixtures."""
    out = np.empty(rows.n, np.uint64)
    at = 0
    for source in rows.sources:
        for i in range(len(source)):
            data = source.ids(i).astype("<i4", copy=False).tobytes()
            out[at] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            at += 1
    return out


def _first_copies(rows: _Rows, digests: Hashes) -> tuple[Index, NDArray[np.bool_]]:
    """(n,) the first row with the same ids; (n,) whether a row repeats an earlier one of its own source."""
    _, begin, group = np.unique(digests, return_index=True, return_inverse=True)
    first = begin[group].astype(np.int64)
    here = np.zeros(rows.n, bool)
    for a, b in zip(rows.start[:-1], rows.start[1:], strict=True):
        _, begin = np.unique(digests[a:b], return_index=True)
        here[a:b] = True
        here[a + begin] = False
    return first, here


def _duplicates(rows: _Rows, a: int, b: int, first: Index) -> Duplicates:
    mine = first[a:b]
    copies = np.flatnonzero(mine != np.arange(a, b)) + a
    size = np.bincount(first, minlength=1)
    groups = np.unique(mine[size[mine] > 1])
    biggest = groups[np.lexsort((groups, -size[groups]))][:EXAMPLES]
    return Duplicates(
        rows=len(copies),
        of_other_sources=_elsewhere(rows, list(zip(copies.tolist(), first[copies].tolist(), strict=True))),
        groups=len(groups),
        examples=tuple(
            Group(rows=int(size[g]), places=tuple(rows.place(int(r)) for r in np.flatnonzero(first == g)[:3]))
            for g in biggest
        ),
    )


def _elsewhere(rows: _Rows, pairs: list[tuple[int, int]]) -> int:
    """How many (row, earlier row) are of two sources."""
    if not pairs:
        return 0
    both = np.array(pairs, np.int64)
    return int((rows.source_of(both[:, 0]) != rows.source_of(both[:, 1])).sum())


# ---- words and their hashes

_CHAR = 0x9E3779B97F4A7C15  # odd, so that they have an inverse modulo 2^64
_WORD = 0xD1342543DE82EF95
_WIDTH = 0xA0761D6478BD642F
_APART = 2  # kind of a character that is a word of its own


@cache
def _kinds() -> NDArray[np.uint8]:
    """(0x110000,) of each code point: 0 separates words, 1 is part of a word, 2 is a word alone."""
    kinds = np.zeros(0x110000, np.uint8)
    for point in range(0x32400):  # no letters are assigned above but variation selectors
        if unicodedata.category(chr(point))[0] in "LNM":
            kinds[point] = 1
    spaceless = ((0xE00, 0xF00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200))
    for low, high in (*spaceless, (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400)):
        kinds[low:high][kinds[low:high] == 1] = _APART
    return kinds


def mix64(x: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _powers(base: int, bits: int) -> tuple[Hashes, Hashes]:
    """base^i and base^-i modulo 2^64 for i < 2^bits."""
    out = []
    for b in (base, pow(base, -1, 1 << 64)):
        factors = np.full(1 << bits, b, np.uint64)
        factors[0] = 1
        out.append(np.cumprod(factors, dtype=np.uint64))
    return out[0], out[1]


def _prefix(values: Hashes, base: int) -> tuple[Hashes, Hashes]:
    """(n + 1,) sums S[i] of values[j] base^j over j < i, and (n + 1,) base^-i. Then (S[b] - S[a]) base^-a is the
    polynomial hash of values[a:b] (Karp, Rabin 1987), wherever it stands."""
    forward, back = _powers(base, max(10, len(values).bit_length()))
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * forward[: len(values)], out=sums[1:])
    return sums, back[: len(values) + 1]


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of n texts, one after another.

    joined: the lower-cased texts.   begin, end (w,): characters of each word in it.   first (n + 1,): the first word
    of each text.   hashes (w,).
    """

    joined: str
    begin: Index
    end: Index
    first: Index
    hashes: Hashes

    @cached_property
    def _sums(self) -> tuple[Hashes, Hashes]:
        return _prefix(self.hashes, _WORD)

    def ngrams(self, width: int) -> Hashes:
        """(max(0, w - width + 1),) the hash of each run of `width` words. Runs may cross from one text into the next:
        `fits` tells which do not."""
        sums, back = self._sums
        if len(self.hashes) < width:
            return np.zeros(0, np.uint64)
        raw = (sums[width:] - sums[:-width]) * back[: len(self.hashes) - width + 1]
        return mix64(raw + np.uint64(width * _WIDTH % (1 << 64)))

    def whole(self) -> Hashes:
        """(n,) the hash of all words of each text, as `ngrams` of that width gives it."""
        sums, back = self._sums
        raw = (sums[self.first[1:]] - sums[self.first[:-1]]) * back[self.first[:-1]]
        return mix64(raw + np.diff(self.first).astype(np.uint64) * np.uint64(_WIDTH))

    def fits(self, at: Index, width: int) -> NDArray[np.bool_]:
        """Whether the `width` words from each `at` on are of one text."""
        text = np.searchsorted(self.first, at, side="right")
        return np.asarray(at + width <= self.first[text])

    def text(self, a: int, b: int) -> str:
        """Words a to b with one space between."""
        return " ".join(self.joined[i:j] for i, j in zip(self.begin[a:b].tolist(), self.end[a:b].tolist(), strict=True))

    def row(self, i: int) -> str:
        return self.text(int(self.first[i]), int(self.first[i + 1]))

    def shingles(self) -> tuple[Hashes, Index]:
        """The hashes of all runs of 5 words inside a text, and (n + 1,) the first run of each text. A text of fewer
        words is one run: it resembles only a text of the same words."""
        n = np.diff(self.first)
        width = np.minimum(n, SHINGLE)
        count = np.where(n > 0, n - width + 1, 0)
        start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        at = np.repeat(self.first[:-1] - start[:-1], count) + np.arange(start[-1])
        wide = np.repeat(width, count)
        sums, back = self._sums
        return mix64((sums[at + wide] - sums[at]) * back[at]), start


def split_words(texts: Sequence[str]) -> Words:
    """
    >>> found = split_words(["It's 9:30, Zoë!", "", "你好 x"])
    >>> found.row(0), found.row(1), found.row(2)
    ('it s 9 30 zoë', '', '你 好 x')
    """
    lowered = [t.lower() for t in texts]
    joined = "\n".join(lowered)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    kind = np.zeros(len(points) + 2, np.uint8)  # a separator before and after
    kind[1:-1] = _kinds()[points]
    inside, apart = kind == 1, kind[1:-1] == _APART
    begin = np.flatnonzero(apart | (inside[1:-1] & ~inside[:-2]))
    end = np.flatnonzero(apart | (inside[1:-1] & ~inside[2:])) + 1
    sums, back = _prefix(points.astype(np.uint64), _CHAR)
    hashes = mix64((sums[end] - sums[begin]) * back[begin])
    starts = np.cumsum([0, *(len(t) + 1 for t in lowered)])
    first = np.searchsorted(begin, starts).astype(np.int64)
    return Words(joined=joined, begin=begin, end=end, first=first, hashes=hashes)


# ---- near-duplicates: MinHash (Broder 1997), banded


@cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(100,) words to xor and (100,) odd words to multiply with: 100 orders of the 32-bit hashes."""
    n = BANDS * BAND_ROWS
    drawn = mix64(np.arange(1, 2 * n + 1, dtype=np.uint64) * np.uint64(_CHAR)) >> np.uint64(32)
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


def _near_duplicates(rows: _Rows, own: Index, signatures: NDArray[np.uint8]) -> dict[int, tuple[int, float]]:
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


def _shingle_sets(rows: _Rows, wanted: Index) -> dict[int, set[int]]:
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


# ---- overlap with evaluation sets


def template_limit(items: int) -> int:
    """A run of words in more than this many items of a task is the task's wording, not an item's own: in more than 10,
    or in more than half of a smaller set (and at least 3).

    >>> [template_limit(n) for n in (1, 5, 12, 1000)]
    [2, 2, 6, 10]
    """
    return min(TEMPLATE_ITEMS, max(2, items // 2))


@dataclass
class _Task:
    """items: their parts.   start: the number of its first item among all tasks' items."""

    name: str
    items: list[tuple[str, ...]]
    start: int
    unchecked: int = 0
    templates: int = 0
    examples: list[Shared] = field(default_factory=list)


class EvalIndex:
    """The evaluation items' runs of 13 words, by hash; `search` looks them up in training rows.

    An item is found where a row has 13 words in a row of one of its parts (question, answer), as in GPT-3's appendix C,
    template wording left out. An item without such a run (every part shorter) is found where one row has all its parts
    whole, if these are 4 words or more. Parts are looked for one by one, since a row has role names or a calculator
    call between them.
    """

    def __init__(self, eval_sets: Mapping[str, Iterable[str | Parts]], sources: Sequence[str]) -> None:
        self.sources = list(sources)
        self.tasks: list[_Task] = []
        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        self.whole: set[int] = set()
        self.widths: set[int] = set()
        start = 0
        for name, texts in eval_sets.items():
            parts = [(t,) if isinstance(t, str) else tuple(t) for t in texts]
            task = _Task(name=name, items=parts, start=start)
            self.tasks.append(task)
            h, item = self._index(task)
            hashes.append(h)
            owners.append(item + start)
            start += len(parts)
        self.found = np.zeros((start, len(self.sources)), bool)
        every, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.lexsort((owner, every))
        self.owner = owner[order]
        self.keys, self.first = np.unique(every[order], return_index=True)
        self.count = np.diff(np.append(self.first, len(every)))
        # Most runs of a row are no item's: a table of their hashes' leading bits, 16 times as long as the index and
        # small enough for the processor's cache, tells so in one look.
        bits = min(24, max(16, len(self.keys).bit_length() + 4))
        self.shift = np.uint64(64 - bits)
        self.maybe = np.zeros(1 << bits, bool)
        self.maybe[self.keys >> self.shift] = True

    def _index(self, task: _Task) -> tuple[Hashes, Index]:
        """The hashes to look for and the item (of the task) each belongs to."""
        n = len(task.items)
        owner = np.repeat(np.arange(n), [len(parts) for parts in task.items])
        texts = [part for parts in task.items for part in parts]
        lengths, keyed = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.uint64)
        hashes, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for block in range(0, len(texts), 1024):
            words = split_words(texts[block : block + 1024])
            span = slice(block, block + 1024)
            lengths[span], keyed[span] = np.diff(words.first), words.whole()
            grams = words.ngrams(NGRAM)
            inside = np.flatnonzero(words.fits(np.arange(len(grams)), NGRAM))
            hashes.append(grams[inside])
            items.append(owner[block + np.searchsorted(words.first, inside, side="right") - 1])
        found, item = np.concatenate(hashes), np.concatenate(items)
        order = np.lexsort((item, found))
        found, item = found[order], item[order]
        once = np.ones(len(found), bool)
        once[1:] = (found[1:] != found[:-1]) | (item[1:] != item[:-1])
        found, item = found[once], item[once]
        _, inverse, count = np.unique(found, return_inverse=True, return_counts=True)
        template = count > template_limit(n)
        task.templates = int(template.sum())
        found, item = found[~template[inverse]], item[~template[inverse]]
        if len(found):
            self.widths.add(NGRAM)

        total = np.bincount(owner, lengths, minlength=n)
        longest = np.zeros(n, np.int64)
        np.maximum.at(longest, owner, lengths)
        short = (longest < NGRAM) & (total >= MIN_WORDS)
        task.unchecked = n - int(short.sum()) - len(np.unique(item))
        # A short item is looked up by the part that fewest items have; the longest of these.
        _, inverse, count = np.unique(keyed, return_inverse=True, return_counts=True)
        order = np.lexsort((-lengths, count[inverse], lengths == 0, owner))
        anchor = order[np.unique(owner[order], return_index=True)[1]]
        anchor = anchor[short[owner[anchor]]]
        self.whole.update((owner[anchor] + task.start).tolist())
        self.widths.update(lengths[anchor].tolist())
        return np.concatenate([found, keyed[anchor]]), np.concatenate([item, owner[anchor]])

    def search(self, words: Words, rows: _Rows, chunk: Index) -> None:
        """Look up all runs of words of the rows `chunk`, whose words these are."""
        source = rows.source_of(chunk)
        for width in sorted(self.widths):
            grams = words.ngrams(width)
            at = np.flatnonzero(self.maybe[grams >> self.shift])
            key = np.searchsorted(self.keys, grams[at])
            hit = self.keys[np.minimum(key, len(self.keys) - 1)] == grams[at]
            at, key = at[hit], key[hit]
            hit = words.fits(at, width)
            at, key = at[hit], key[hit]
            if not len(at):
                continue
            count = self.count[key]
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            owner = self.owner[np.repeat(self.first[key], count) + within]
            at = np.repeat(at, count)
            row = np.searchsorted(words.first, at, side="right") - 1
            new = np.flatnonzero(~self.found[owner, source[row]])
            for a, item, r in zip(at[new].tolist(), owner[new].tolist(), row[new].tolist(), strict=True):
                if self.found[item, source[r]]:
                    continue
                text = words.text(a, a + width)
                if self._holds(item, text, words, r):
                    self.found[item, source[r]] = True
                    self._example(item, int(source[r]), rows.place(int(chunk[r])), text)

    def _holds(self, item: int, text: str, words: Words, row: int) -> bool:
        """Whether the words that were found by their hash are the item's, and all of it where it is a short one."""
        parts = self._item(item)
        if item in self.whole:
            there = f" {words.row(row)} "
            return all(f" {part} " in there for part in parts if part)
        return any(f" {text} " in f" {part} " for part in parts)

    def _task(self, item: int) -> _Task:
        return next(t for t in reversed(self.tasks) if item >= t.start)

    def _item(self, item: int) -> list[str]:
        task = self._task(item)
        parts = split_words(task.items[item - task.start])
        return [parts.row(i) for i in range(len(parts.first) - 1)]

    def _example(self, item: int, source: int, place: str, text: str) -> None:
        task = self._task(item)
        if len(task.examples) < EXAMPLES:
            task.examples.append(Shared(item=item - task.start, source=self.sources[source], place=place, words=text))

    def result(self) -> Iterator[TaskOverlap]:
        for task in self.tasks:
            found = self.found[task.start : task.start + len(task.items)]
            hit = int(found.any(axis=1).sum())
            yield TaskOverlap(
                task=task.name,
                items=len(task.items),
                unchecked=task.unchecked,
                contaminated=hit,
                share=round(hit / max(1, len(task.items)), 5),
                template_ngrams=task.templates,
                sources=tuple(zip(self.sources, (int(n) for n in found.sum(axis=0)), strict=True)),
                examples=tuple(task.examples),
            )
