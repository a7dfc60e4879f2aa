"""Texts as words and 64-bit hashes of runs of words.

Text is compared by words: lower-cased letters, digits and marks; all else separates. A character of a script written
without spaces (Chinese, Japanese, Thai ...) is a word of its own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Index = NDArray[np.int64]

SHINGLE = 5  # words

CHAR = 0x9E3779B97F4A7C15  # odd, so that they have an inverse modulo 2^64
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
    sums, back = _prefix(points.astype(np.uint64), CHAR)
    hashes = mix64((sums[end] - sums[begin]) * back[begin])
    starts = np.cumsum([0, *(len(t) + 1 for t in lowered)])
    first = np.searchsorted(begin, starts).astype(np.int64)
    return Words(joined=joined, begin=begin, end=end, first=first, hashes=hashes)
