"""Evaluation items found in training rows, by 64-bit hashes; what is found is checked again by its words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftflow.data.audit.ngrams import Hashes, Index, Words, split_words
from sftflow.data.audit.rows import EXAMPLES, AuditRows

if TYPE_CHECKING:
    from sftflow.tasks import Item

Parts = Sequence[str]

NGRAM = 13  # words (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C)
MIN_WORDS = 4  # a shorter item would be found in any text
TEMPLATE_ITEMS = 10


@dataclass(frozen=True, kw_only=True)
class OverlapExample:
    """A training row that has words of an evaluation item. item: its number in the set, from 0, or its id."""

    item: int | str
    source: str
    place: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Evaluation items found in training rows, by `ngram` words in a row (see `EvalIndex`).

    items: of the task.   contaminated: items found.   share: of all items.   unchecked: items of fewer than 4 words, or
    with template wording only.
    """

    ngram: int = NGRAM
    items: int
    contaminated: int
    share: float
    unchecked: int
    examples: tuple[OverlapExample, ...]


@dataclass(frozen=True, kw_only=True)
class TaskOverlap(Overlap):
    """template_ngrams: left out as template wording.   sources: items found, by source."""

    task: str
    template_ngrams: int
    sources: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        out = {k: v for k, v in asdict(self).items() if k != "task"}
        found = [{"name": name, "items": n, "share": round(n / max(1, self.items), 5)} for name, n in self.sources]
        return {**out, "sources": found}


def item_parts(item: Item) -> tuple[str, ...]:
    """An evaluation item as the overlap reads it: what is asked, and the answer where it is a text of its own."""
    asked = "\n\n".join(m.text for m in item.messages)
    return (asked, item.answer) if isinstance(item.answer, str) and not item.choices else (asked,)


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
    examples: list[OverlapExample] = field(default_factory=list)


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
            found, item = self._index(task)
            hashes.append(found)
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

    def _candidates(self, words: Words) -> Iterator[tuple[int, Index, Index, Index]]:
        """(width, the run's first word, the item, the row) of all runs of words that have the hash of an item's."""
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
            yield width, at, owner, np.searchsorted(words.first, at, side="right") - 1

    def search(self, words: Words, rows: AuditRows, chunk: Index) -> None:
        """Look up all runs of words of the rows `chunk`, whose words these are."""
        source = rows.source_of(chunk)
        for width, at, owner, row in self._candidates(words):
            new = np.flatnonzero(~self.found[owner, source[row]])
            for a, item, r in zip(at[new].tolist(), owner[new].tolist(), row[new].tolist(), strict=True):
                text = words.text(a, a + width)
                if not self.found[item, source[r]] and self._holds(item, text, words, r):
                    self.found[item, source[r]] = True
                    task = self._task(item)
                    where = {"source": self.sources[source[r]], "place": rows.place(int(chunk[r]))}
                    task.examples.append(OverlapExample(item=item - task.start, words=text, **where))

    def rows_of_tasks(self, words: Words) -> NDArray[np.bool_]:
        """(rows, tasks) whether a row has an item of the task."""
        found = np.zeros((len(words.first) - 1, len(self.tasks)), bool)
        starts = [task.start for task in self.tasks]
        for width, at, owner, row in self._candidates(words):
            task = np.searchsorted(starts, owner, side="right") - 1
            for a, item, r, t in zip(at.tolist(), owner.tolist(), row.tolist(), task.tolist(), strict=True):
                found[r, t] = found[r, t] or self._holds(item, words.text(a, a + width), words, r)
        return found

    def _holds(self, item: int, text: str, words: Words, row: int) -> bool:
        """Whether the words that were found by their hash are the item's, and all of it where it is a short one."""
        task = self._task(item)
        split = split_words(task.items[item - task.start])
        parts = [split.row(i) for i in range(len(split.first) - 1)]
        if item in self.whole:
            there = f" {words.row(row)} "
            return all(f" {part} " in there for part in parts if part)
        return any(f" {text} " in f" {part} " for part in parts)

    def _task(self, item: int) -> _Task:
        return next(t for t in reversed(self.tasks) if item >= t.start)

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
                sources=tuple(zip(self.sources, found.sum(axis=0).tolist(), strict=True)),
                examples=tuple(task.examples[:EXAMPLES]),
            )
