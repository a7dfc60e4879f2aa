"""The task mixture: sources -> rendered examples, a ledger that accounts for every row, and held-out rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation, parse_row, read_rows
from sftflow.errors import DataError, FormatError, MaskError, SchemaError, SftflowError
from sftflow.mixture.pack import Example, best_fit, padding_share
from sftflow.mixture.tasks import TASKS, TaskSource, make_task
from sftflow.recipe import Recipe, SourceEntry


@dataclass
class SourceLedger:
    """What became of one source's rows. tokens and supervised_tokens count training rows, repeats included."""

    name: str
    repeat: int = 1
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut: int = 0
    dropped: int = 0
    expanded: int = 0
    validation_rows: int = 0
    boundary_splits: int = 0
    dropped_why: dict[str, int] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.dropped += 1
        self.dropped_why[why] = self.dropped_why.get(why, 0) + 1


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """examples: training sequences, repeats included, unshuffled (the loop shuffles).   held_out: for the
    validation loss.   samples: the first rendered row of each source, for the mask view."""

    examples: list[Example]
    held_out: list[Example]
    names: list[str]
    sources: list[SourceLedger]
    samples: list[Rendered]
    max_length: int
    bad_rows: list[str]

    def ledger(self) -> dict[str, Any]:
        lengths = [len(e.ids) for e in self.examples]
        rows = best_fit(lengths, self.max_length)
        return {
            "sources": [vars(s) for s in self.sources],
            "rows": len(self.examples),
            "tokens": sum(lengths),
            "supervised_tokens": sum(s.supervised_tokens for s in self.sources),
            "packed_rows": len(rows),
            "padding_share": round(padding_share(lengths, rows, self.max_length), 5),
            "validation_rows": len(self.held_out),
            "bad_rows": self.bad_rows[:100],
            "data_sha256": self.digest(),
        }

    def digest(self) -> str:
        """One hash of every id and mask, in order."""
        digest = hashlib.sha256()
        for e in (*self.examples, *self.held_out):
            digest.update(e.ids.astype(np.int32).tobytes())
            digest.update(e.mask.tobytes())
        return digest.hexdigest()[:16]


def source_conversations(entry: SourceEntry, recipe: Recipe, bad: list[str]) -> Iterable[Conversation]:
    """The conversations of one mixture entry."""
    if entry.source in TASKS:
        source = TaskSource(
            path=entry.path,
            seed=recipe.train.seed,
            limit=entry.limit,
            options={"identity": recipe.identity.model_dump()},
        )
        yield from make_task(entry.source, source, "mixture").conversations(entry.split)
        return
    rows = []
    for place, row in read_rows(entry.path or entry.source):
        try:
            rows.append(parse_row(row, place))
        except SchemaError as error:
            if recipe.on_bad_row == "stop":
                raise
            bad.append(str(error))
    if entry.limit is not None and entry.limit < len(rows):
        chosen = sorted(random.Random(recipe.train.seed).sample(range(len(rows)), entry.limit))
        rows = [rows[i] for i in chosen]
    if not rows:
        raise DataError(entry.path or entry.source, "no rows in it", "give a file with conversations")
    yield from rows


def build_mixture(recipe: Recipe, renderer: Renderer, progress: Callable[[str, int], None] | None = None) -> Mixture:
    """Render every source of the recipe. `progress(source, rows_done)` is called now and then.

    Raises SchemaError, FormatError or MaskError at the first bad row (on_bad_row: skip counts them instead).
    """
    examples: list[Example] = []
    held_out: list[Example] = []
    names, ledgers, samples = [], [], []
    bad: list[str] = []
    for number, entry in enumerate(recipe.mixture):
        name = entry.label
        ledger = SourceLedger(name=name, repeat=entry.repeat)
        mine: list[Example] = []
        first: Rendered | None = None
        for count, conversation in enumerate(source_conversations(entry, recipe, bad)):
            if progress and count % 200 == 0:
                progress(name, count)
            try:
                rows = fitted_rows(conversation, renderer, recipe, ledger)
            except (MaskError, FormatError) as error:
                if recipe.on_bad_row == "stop":
                    raise
                bad.append(str(error))
                ledger.drop(type(error).__name__)
                continue
            if len(rows) > 1:
                ledger.expanded += 1
            for rendered in rows:
                ledger.boundary_splits += rendered.boundary_splits
                if rendered.n_supervised == 0:
                    ledger.drop("nothing supervised")
                    continue
                first = first or rendered
                mine.append(Example(ids=rendered.ids, mask=rendered.mask, source=number))
        train, held = split_held_out(mine, recipe.validation, f"{name}:{recipe.train.seed}")
        ledger.rows, ledger.validation_rows = len(train), len(held)
        ledger.tokens = entry.repeat * sum(len(e.ids) for e in train)
        ledger.supervised_tokens = entry.repeat * sum(int(e.mask[1:].sum()) for e in train)
        examples.extend(train * entry.repeat)
        held_out.extend(held)
        names.append(name)
        ledgers.append(ledger)
        if first is not None:
            samples.append(first)
    if not examples:
        raise DataError("mixture", "no row is left to train on", "see the ledger's dropped rows")
    return Mixture(
        examples=examples,
        held_out=held_out,
        names=names,
        sources=ledgers,
        samples=samples,
        max_length=recipe.train.max_length,
        bad_rows=bad,
    )


def fitted_rows(conversation: Conversation, renderer: Renderer, recipe: Recipe, ledger: SourceLedger) -> list[Rendered]:
    """The row's training examples, none longer than max_length: an over-long conversation is cut back to whole
    turns that fit, or dropped, and counted."""
    limit = recipe.train.max_length
    rows = renderer.render_rows(conversation)
    if all(len(r.ids) <= limit for r in rows):
        return rows
    if len(rows) > 1:
        kept = [r for r in rows if len(r.ids) <= limit]
        if kept:
            ledger.cut += 1
        else:
            ledger.drop("longer than max_length")
        return kept
    if recipe.train.overlong == "cut":
        for turn in range(len(conversation.messages) - 1, 1, -1):
            if conversation.messages[turn - 1].role != "assistant" or not conversation.messages[turn - 1].weight:
                continue
            try:
                shorter = renderer.render(replace(conversation, messages=conversation.messages[:turn]))
            except SftflowError:
                continue
            if len(shorter.ids) <= limit:
                ledger.cut += 1
                return [shorter]
    ledger.drop("longer than max_length")
    return []


def split_held_out(examples: list[Example], validation: float, seed: str) -> tuple[list[Example], list[Example]]:
    """(training, held-out) rows of one source: a share below 1, a count from 1 on. Equal rows stay on one side."""
    if validation <= 0 or len(examples) < 2:
        return examples, []
    wanted = min(int(validation) if validation >= 1 else max(1, round(len(examples) * validation)), len(examples) // 2)
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    groups: dict[bytes, list[int]] = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.ids.tobytes(), []).append(i)
    held: set[int] = set()
    for i in order:
        if len(held) >= wanted:
            break
        equal = groups[examples[i].ids.tobytes()]
        if len(held) + len(equal) <= len(examples) // 2:  # never the whole source, however often its rows repeat
            held.update(equal)
    return (
        [e for i, e in enumerate(examples) if i not in held],
        [e for i, e in enumerate(examples) if i in held],
    )
