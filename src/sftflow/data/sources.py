"""The rows of a mixture entry, as they stand: numbered, sampled where the entry has a limit, not yet parsed."""

from __future__ import annotations

import difflib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from sftflow.chat.columns import Columned, require_columns
from sftflow.chat.data_files import numbered_rows
from sftflow.chat.files.columns import Wanted
from sftflow.chat.files.names import Places, is_pattern
from sftflow.chat.files.sets import is_set, pinned, set_name
from sftflow.chat.plain_text import PlainText
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, conversation_of
from sftflow.data.render_pool import NumberedRow
from sftflow.foundation.atomic_io import digest_of
from sftflow.foundation.errors import DataError, RecipeError, SftflowError
from sftflow.foundation.missing import not_there
from sftflow.recipe import REPLAY, HeldOut, Recipe, SourceEntry, own_task
from sftflow.tasks import TASKS, TaskSource, is_task, make_task, own_class
from sftflow.tasks.identity import identity_of

REPLAY_FILE = Path(__file__).with_name("replay.jsonl.bz2")
"""what `builtin:replay` means: text that the shipped base has written itself (scripts/make_replay.py)"""


def check_source(entry: SourceEntry, place: str = "mixture") -> None:
    """Raises RecipeError or TaskError where an entry names a task that there is not, a split of a file, or text without
    a path.   place: where it was written."""
    if entry.is_text and entry.path is None:
        fact = "source: text is plain text, and it is not said of which file"
        raise RecipeError(place, fact, f"write path: FILE beside it, or path: {REPLAY}")
    if entry.path == REPLAY and not entry.is_text:
        raise RecipeError(place, f"{REPLAY} is plain text", f"write {{source: text, path: {REPLAY}}}")
    if entry.columns and is_task(entry.source):
        fact = f"columns beside the task {entry.source}, which knows the names of its own"
        raise RecipeError(place, fact, "leave out columns, or name the file as the source")
    if own_task(entry.source) or entry.source.endswith(".py"):
        own_class(entry.source, place)
    elif entry.path is None and entry.has_bare_name and entry.source not in TASKS:
        near = difflib.get_close_matches(entry.source, TASKS, 1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}; a file is written ./{entry.source}"
        )
        if os.path.isdir(entry.source):
            hint = f"for the folder of that name write ./{entry.source}"
        elif os.path.exists(entry.source):
            hint = f"for the file of that name write ./{entry.source}"
        raise RecipeError(place, f"unknown task {entry.source!r}", hint)
    name = entry.path or entry.source
    if not (is_task(entry.source) or name.startswith("hub:") or os.path.isdir(name)):
        for key, said in (("config", entry.config), ("split", entry.split if entry.split != "train" else None)):
            if said:
                fact = f"{key} {said!r}: only data sets (hub:NAME, or a folder) and tasks have this key"
                raise RecipeError(place, fact, f"name the {key}'s file")
    data_name(entry)  # says what does not fit together


def data_name(entry: SourceEntry) -> str | None:
    """The name of an entry's data with all that it says of it: configuration and split; None where it has none."""
    name = entry.path if is_task(entry.source) else entry.path or entry.source
    if name == REPLAY:
        return str(REPLAY_FILE)
    split = None if entry.split == "train" else entry.split
    of_files = is_task(entry.source) and name is not None and not (name.startswith("hub:") or is_set(name))
    return name if name is None or of_files or not (entry.config or split) else set_name(name, entry.config, split)


def pinned_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the commit of each set of the hub that it names. Raises DataError where the hub cannot say it."""

    def pin(entry: SourceEntry) -> SourceEntry:
        key = "source" if entry.path is None else "path"
        return entry.model_copy(update={key: pinned(getattr(entry, key))})

    update: dict[str, Any] = {"mixture": tuple(map(pin, recipe.mixture))}
    if isinstance(recipe.validation, HeldOut):
        files = tuple(map(pin, recipe.validation.files))
        update["validation"] = recipe.validation.model_copy(update={"files": files})
    return recipe.model_copy(update=update)


def rows_of_entry(
    entry: SourceEntry, recipe: Recipe, wanted: Wanted | None = None, places: Places | None = None
) -> Iterator[NumberedRow]:
    """(number, payload) of each row of a mixture entry, a sample of `limit` of them where it asks for one.

    wanted: told a row's index among these, from 0, whether it is asked for; None: all are.   places: told where each
    file begins."""
    place, n = "mixture", len(recipe.mixture)
    if entry in recipe.sources:
        number = recipe.sources.index(entry)
        at = ("mixture", number) if number < n else ("validation", "files", number - n)
        place = recipe.origin.place(*at, "source")
    check_source(entry, place)
    if is_task(entry.source):
        options = {"identity": identity_of(recipe.model_dump(mode="json"))}
        source = TaskSource(
            path=entry.path, config=entry.config, seed=recipe.train.seed, limit=entry.limit, options=options
        )
        if places is not None:
            places.begin(0, place_of(entry))
        number = 0
        for number, conversation in enumerate(
            make_task(entry.source, source, place, "write path: FILE beside it").conversations(entry.split), 1
        ):
            if wanted is None or wanted(number - 1):
                yield number, conversation
        if not number:
            raise DataError(entry.path or entry.source, "no rows in it", f"give a data file of {entry.source}")
        return
    name = data_name(entry) or entry.source
    if places is not None and (entry.place or entry.path == REPLAY):
        places.begin(0, place_of(entry))
        places.fixed = True
    if entry.published and not (name.startswith("hub:") or is_pattern(name) or os.path.exists(name)):
        raise DataError(name, *not_there(name, otherwise=f"get it: {entry.published}"))
    columns = entry.columns
    plain = entry.is_text
    if columns:
        require_columns((row for _, row in numbered_rows(name, plain=plain)), columns, place_of(entry))
    if entry.limit is not None:
        n = sum(1 for _ in numbered_rows(name, plain=plain))
        if entry.limit < n:
            sample = sorted(random.Random(recipe.train.seed).sample(range(n), entry.limit))
            wanted = frozenset(row for i, row in enumerate(sample) if wanted is None or wanted(i)).__contains__
    none = True
    for number, row in numbered_rows(name, wanted, places, plain=plain):
        none = False
        row = Columned(row, columns) if columns else row
        yield number, PlainText(row) if plain else row
    if none and not any(True for _ in numbered_rows(name, plain=plain)):
        raise DataError(place_of(entry), "no rows in it", f"give a file with {'text' if plain else 'conversations'}")


def made_digest(entry: SourceEntry, recipe: Recipe) -> str:
    """Of all rows that a user's task makes: what else its code reads is not known."""
    rows = (row.to_row() if isinstance(row, Conversation) else row for _, row in rows_of_entry(entry, recipe))
    return digest_of(json.dumps(row, default=str).encode() + b"\n" for row in rows)


def place_of(entry: SourceEntry) -> str:
    """What errors call the entry's rows, with the row's number behind it: `data.jsonl` in `data.jsonl:17`."""
    return entry.place or (entry.source if is_task(entry.source) else entry.path or entry.source)


def labels_of(entries: Sequence[SourceEntry]) -> list[str]:
    """What each entry is called in ledger, logs and report: its name, its task, or its file without the ending. Files
    that would be called alike are told apart by the shortest ends of their paths, what is left by a number.

    >>> labels_of([SourceEntry(source=s) for s in ("a/train.jsonl", "b/train.jsonl", "c.jsonl", "c.jsonl")])
    ['a/train', 'b/train', 'c', 'c-2']
    """
    labels = [entry.label for entry in entries]
    for label in {label for label in labels if labels.count(label) > 1}:
        files = {
            i: Path(place_of(entry))
            for i, entry in enumerate(entries)
            if entry.label == label and not (entry.name or entry.has_bare_name)
        }
        others = {own for i, own in enumerate(labels) if i not in files}
        for ends in _ends_of(files):
            if len(set(ends.values())) == len(set(files.values())) and others.isdisjoint(ends.values()):
                labels = [ends.get(i, own) for i, own in enumerate(labels)]
                break
    distinct = list(labels)
    taken: set[str] = set()
    for i in sorted(range(len(entries)), key=lambda i: entries[i].name is None):  # a name that was given stays
        numbers = count(2)
        while distinct[i] in taken or (distinct[i] in labels and distinct[i] != labels[i]):
            distinct[i] = f"{labels[i]}-{next(numbers)}"
        taken.add(distinct[i])
    return distinct


def _ends_of(files: Mapping[int, Path]) -> Iterator[dict[int, str]]:
    """Ever longer ends of paths, below the folder that all share (which may be moved): without the files' endings, then
    with them."""
    if len({path.is_absolute() for path in files.values()}) == 1:
        shared = os.path.commonpath([path.parent for path in files.values()])
        files = {i: path.relative_to(shared) if shared else path for i, path in files.items()}
    deepest = max((len(path.parts) for path in files.values()), default=0)
    for paths in ({i: path.parent / path.stem for i, path in files.items()}, files):
        for depth in range(1, deepest + 1):
            yield {i: "/".join(path.parts[-depth:]) for i, path in paths.items()}


def sample_of(entry: SourceEntry, recipe: Recipe, renderer: Renderer, n: int) -> list[Conversation]:
    """The first `n` rows of an entry that can be read, as they are rendered."""
    out: list[Conversation] = []
    places = Places()
    for number, payload in islice(rows_of_entry(entry, recipe, places=places), n):
        try:
            out.append(renderer.declared(conversation_of(payload, places[number])))
        except SftflowError:
            continue  # it will be named, or skipped, when the rows are rendered
    return out
