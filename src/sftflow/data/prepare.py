"""A source of the mixture -> its rendered rows on disk: read in blocks, rendered on all cores, cached by content. What
is in the cache already, whole or in parts (`parts.py`), is not rendered again."""

from __future__ import annotations

import atexit
import contextlib
import functools
import heapq
import json
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from sftflow.chat.columns import Columned
from sftflow.chat.files.columns import Wanted
from sftflow.chat.files.names import Places
from sftflow.chat.plain_text import PlainText
from sftflow.chat.render import Renderer
from sftflow.data.parts import (
    PROVEN,
    NumberedBlock,
    Part,
    missing_parts,
    name_of,
    read_part,
    stored_parts,
    told_parts,
    write_part,
)
from sftflow.data.render_pool import Block, Counts, Job, NumberedRow, Question, Workers, n_cores, render_block
from sftflow.data.row_cache import cache_key, is_whole, stamps_of
from sftflow.data.sources import labels_of, place_of, rows_of_entry
from sftflow.data.store import RowStore, RowWriter
from sftflow.foundation.atomic_io import remove_directory, write_directory
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.errors import DataError, RunError
from sftflow.recipe import Recipe, SourceEntry, own_task

BLOCK_ROWS, BLOCK_BYTES = 256, 1 << 20
ALONE_BLOCKS = 6  # a source of fewer blocks is rendered here: processes would take longer to start
FEW_CORES = 4
VERIFIED_SAMPLE = 32  # rows of a source that are verified where not all of them shall be
MOST_BAD = 0.05  # more bad rows than this share are an error even where bad rows are skipped

Progress = Callable[[str, int], None]

log = logging.getLogger("sftflow.data")


@dataclass(frozen=True)
class _Source:
    """A mixture entry, and how its rows are rendered.   label: what it is called.   key: what they are kept under.
    places: where they stand, as far as they were read."""

    entry: SourceEntry
    recipe: Recipe
    renderer: Renderer
    job: Job
    label: str
    stamps: list[object]
    key: str | None
    places: Places

    def blocks(self, *, every_row: bool, wanted: Wanted | None = None) -> Generator[NumberedBlock, None, None]:
        """Its blocks, or the wanted of them, rendered, in order. Raises DataError at the end where the data was
        written to meanwhile: then the key says something else than what was read."""
        of_block = None if wanted is None else (lambda row: wanted(row // BLOCK_ROWS))
        rows = rows_of_entry(self.entry, self.recipe, of_block, self.places)
        blocks = _blocks(rows, count() if wanted is None else filter(wanted, count()))
        with contextlib.closing(_rendered(blocks, self.job, self.renderer, every_row, self.places)) as rendered:
            yield from rendered
        if stamps_of(self.entry, self.recipe) != self.stamps:
            if own_task(self.entry.source):
                fact = "it makes other rows each time"
                raise DataError(self.job.prefix, fact, "draw what is drawn from random.Random(self.source.seed)")
            raise DataError(self.job.prefix, "it was written to while it was read", "run this again")

    def write(self, directory: Path, fill: Callable[[Path], None]) -> None:
        """Put a store into the cache. Raises RunError where that cannot be written."""
        try:
            write_directory(directory, fill, replace=not is_whole(directory))
        except OSError as error:
            if not is_whole(directory):  # else another process was faster
                fact = f"cannot write ({error.strerror or error})"
                raise RunError(str(directory), fact, "free space, or set SFTFLOW_CACHE") from error


def _source(entry: SourceEntry, number: int, recipe: Recipe, renderer: Renderer) -> _Source:
    place = place_of(entry)
    job = Job(renderer.spec, place, recipe.train.max_length, recipe.train.overlong, recipe.on_bad_row)
    stamps, label = stamps_of(entry, recipe), labels_of(recipe.sources)[number]
    return _Source(entry, recipe, renderer, job, label, stamps, cache_key(entry, recipe, job, stamps), Places())


def open_source(directory: Path, number: int, recipe: Recipe, *, new: bool = False) -> RowStore:
    """The rendered rows of mixture entry `number`, from where they lie."""
    label, prefix = labels_of(recipe.sources)[number], place_of(recipe.sources[number])
    return RowStore(directory, name=label, number=number, prefix=prefix, new=new)


def prepare_source(
    entry: SourceEntry, number: int, recipe: Recipe, renderer: Renderer, *, every_row: bool, progress: Progress | None
) -> RowStore:
    """The rendered rows of mixture entry `number`. every_row: verify each of them, not only a sample. Where parts of
    them are in the cache they are joined, and what is missing is rendered here, each row of it verified as theirs are.

    Raises the first bad row's error (on_bad_row: stop), or DataError where more than 5% of the rows are bad.
    """
    source, folder = _source(entry, number, recipe, renderer), cache_folder()
    key, prefix = source.key, source.job.prefix
    said = functools.partial(progress, source.label) if progress else None

    if key is None or folder is None:
        directory = _for_this_process(folder)
        _write_rows(directory, [source.blocks(every_row=every_row)], prefix, source.places, said)
        return open_source(directory, number, recipe)
    sampled, proven = folder / key, folder / f"{key}{PROVEN}"
    parts = stored_parts(folder, key)  # looked for first: whoever joins them removes them when the whole is there
    for kept in (proven,) if every_row else (proven, sampled):
        if is_whole(kept):
            with contextlib.suppress(OSError):  # a cache that is shared and read-only
                os.utime(kept)
            return open_source(kept, number, recipe)
    missing = missing_parts(parts)
    every_row = every_row or bool(parts)
    kept = proven if every_row else sampled
    if parts:
        log.warning(f"{source.label}: {told_parts(list(parts), missing)}")

    def fill(directory: Path) -> None:
        streams = [read_part(path, source.places) for path in parts.values()]
        if missing or not parts:
            wanted = (lambda block: any(part.takes(block, key) for part in missing)) if parts else None
            streams.append(source.blocks(every_row=every_row, wanted=wanted))
        _write_rows(directory, streams, prefix, source.places, said)

    source.write(kept, fill)
    for path in parts.values():  # their rows are in the whole now
        with contextlib.suppress(OSError):
            remove_directory(path)
    return open_source(kept, number, recipe, new=True)


def _for_this_process(cache: Path | None) -> Path:
    """A folder for rows that are not kept, until this process ends: in the cache, where other ranks of the run see it,
    too, else where temporary files go."""
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=".sftflow-rows-", suffix=".tmp", dir=cache))
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="sftflow-rows-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def prepare_part(
    entry: SourceEntry, number: int, recipe: Recipe, renderer: Renderer, part: Part, folder: Path, progress: Progress
) -> tuple[str, dict[str, Any] | None]:
    """Render a part of mixture entry `number` into the cache, unless it is there: (the key of the source, the part's
    meta.json); None for that where the whole source is there.

    Raises the first bad row's error (on_bad_row: stop), and DataError where the rows would not be kept.
    """
    source = _source(entry, number, recipe, renderer)
    key = source.key
    if key is None:
        next(rows_of_entry(entry, recipe))  # says what is wrong with the file
        fact = "its rows are not kept, for its contents cannot be compared, so nobody would find a part of them"
        raise DataError(source.job.prefix, fact, "download it, and name its file")
    directory = folder / name_of(key, part)
    if is_whole(folder / f"{key}{PROVEN}"):
        return key, None
    if not is_whole(directory):
        blocks = source.blocks(every_row=True, wanted=lambda block: part.takes(block, key))
        said = functools.partial(progress, source.label)
        source.write(directory, lambda made: write_part(made, blocks, source.places, said))
    return key, json.loads((directory / "meta.json").read_text(encoding="utf-8"))


def _write_rows(
    directory: Path,
    streams: Sequence[Generator[NumberedBlock, None, None]],
    prefix: str,
    places: Places,
    progress: Callable[[int], None] | None,
) -> None:
    """Rendered blocks, each stream's in the source's order -> a new store of all, in that order, in `directory`.

    places: filled by the streams."""
    total, bad = Counts(), []
    sample: dict[str, Any] | None = None
    with contextlib.ExitStack() as open_here:
        writer = open_here.enter_context(contextlib.closing(RowWriter(directory)))
        for stream in streams:
            open_here.enter_context(contextlib.closing(stream))
        for _, block in heapq.merge(*streams, key=lambda numbered: numbered[0]):
            if block.error is not None:
                raise block.error
            total.add(block.counts)
            bad += block.bad
            sample = sample or block.sample
            writer.append(block.ids, block.mask, block.table, block.spans)
            if progress:
                progress(total.seen)
        if len(bad) > MOST_BAD * total.seen:
            fact = (
                f"{len(bad):,} of {total.seen:,} rows are bad, more than {MOST_BAD:.0%}; the first: {bad[0]['reason']}"
            )
            raise DataError(prefix, fact, "mend or remove these rows: on_bad_row: skip is for a few")
        more = {"bad": len(bad), "bad_rows": bad, "sample": sample, "prefix": prefix, "files": places.files}
        writer.finish({**vars(total), **more})


def _blocks(rows: Iterator[NumberedRow], places: Iterator[int]) -> Iterator[tuple[int, list[NumberedRow]]]:
    """Rows -> what is rendered at once: BLOCK_ROWS of them, or fewer where they are long, each with its block's place.

    places: those of the blocks that the rows are of, each full but the source's last."""
    for place in places:
        block: list[NumberedRow] = []
        n = size = 0
        for row in islice(rows, BLOCK_ROWS):
            block.append(row)
            n += 1
            size += _size(row[1])
            if size >= BLOCK_BYTES:
                yield place, block
                block, size = [], 0
        if block:
            yield place, block
        if n < BLOCK_ROWS:
            return


def _size(payload: Any) -> int:
    """Of a row, as far as it is known at once: bytes of a line, characters of a text."""
    if isinstance(payload, PlainText | Columned):
        return _size(payload.row)
    if isinstance(payload, dict):
        return sum(len(value) for value in payload.values() if isinstance(value, str))
    return len(payload) if isinstance(payload, bytes) else 0


def _rendered(
    blocks: Iterator[tuple[int, list[NumberedRow]]], job: Job, renderer: Renderer, every_row: bool, at: Places
) -> Generator[NumberedBlock, None, None]:
    """The blocks rendered, in order: here, or where there are many by processes, which end when it is closed.

    at: where their rows stand."""
    first = list(islice(blocks, ALONE_BLOCKS))
    places: deque[int] = deque()  # of the blocks that are under way

    def questions() -> Iterator[Question]:
        for n, (place, block) in enumerate(chain(first, blocks)):
            places.append(place)
            among = at.among([block[0][0], block[-1][0]])
            yield block, -1 if every_row else VERIFIED_SAMPLE if n == 0 else 0, among

    def here(block: Question) -> Block:
        return render_block(renderer, job, *block)

    cores = n_cores()
    if len(first) < ALONE_BLOCKS or cores == 1:
        yield from ((places.popleft(), block) for block in map(here, questions()))
        return
    few = cores <= FEW_CORES  # then this process renders, too
    with Workers(job, cores - 1 if few else cores) as workers:
        for block in workers.render(questions(), here if few else None):
            yield places.popleft(), block
