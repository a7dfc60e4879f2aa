"""A source of the mixture -> its rendered rows on disk: read in blocks, rendered on all cores, cached by content."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation
from sftflow.data.render_pool import Block, Counts, Job, NumberedRow, Workers, n_cores, render_block
from sftflow.data.row_cache import cache_folder, cache_key, prune
from sftflow.data.sources import labels_of, place_of, rows_of_entry
from sftflow.data.store import RowStore, RowWriter
from sftflow.foundation.atomic_io import write_directory
from sftflow.foundation.errors import DataError, RunError
from sftflow.recipe import Recipe, SourceEntry

BLOCK_ROWS, BLOCK_BYTES = 256, 1 << 20
ALONE_BLOCKS = 6  # a source of fewer blocks is rendered here: processes would take longer to start
FEW_CORES = 4
VERIFIED_SAMPLE = 32  # rows of a source that are verified where not all of them shall be
MOST_BAD = 0.05  # more bad rows than this share are an error even where bad rows are skipped

Progress = Callable[[str, int], None]


def prepare_source(
    entry: SourceEntry, number: int, recipe: Recipe, renderer: Renderer, *, every_row: bool, progress: Progress | None
) -> RowStore:
    """The rendered rows of mixture entry `number`. every_row: verify each of them, not only a sample.

    Raises the first bad row's error (on_bad_row: stop), or DataError where more than 5% of the rows are bad.
    """
    place, label = place_of(entry), labels_of(recipe.mixture)[number]
    job = Job(renderer.spec, place, recipe.train.max_length, recipe.train.overlong, recipe.on_bad_row)

    def fill(directory: Path) -> None:
        said = functools.partial(progress, label) if progress else None
        with contextlib.closing(_rendered(_blocks(rows_of_entry(entry, recipe)), job, renderer, every_row)) as blocks:
            _write_rows(directory, blocks, place, "all" if every_row else "sample", said)

    def opened(directory: Path) -> RowStore:
        return RowStore(directory, name=label, number=number, prefix=place)

    key, folder = cache_key(entry, recipe, job), cache_folder()
    if key is None or folder is None:
        directory = Path(tempfile.mkdtemp(prefix="sftflow-rows-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        fill(directory)
        return opened(directory)
    kept = folder / key
    if (kept / "meta.json").is_file():
        rows = opened(kept)
        if rows.meta["verified"] == "all" or not every_row:
            with contextlib.suppress(OSError):  # a cache that is shared and read-only
                os.utime(kept)
            return rows
    try:
        write_directory(kept, fill)
    except OSError as error:
        fact = f"cannot write ({error.strerror or error})"
        raise RunError(str(kept), fact, "free space, or set SFTFLOW_CACHE") from error
    prune(folder, keep=kept)
    return opened(kept)


def _write_rows(
    directory: Path, blocks: Iterable[Block], prefix: str, verified: str, progress: Callable[[int], None] | None
) -> None:
    """Rendered blocks -> a new store in `directory`. verified: which rows were, "all" or "sample"."""
    total, bad = Counts(), []
    sample: Conversation | None = None
    with contextlib.closing(RowWriter(directory)) as writer:
        for block in blocks:
            if block.error is not None:
                raise block.error
            total.add(block.counts)
            bad += block.bad
            sample = sample or block.sample
            writer.append(block.ids, block.mask, block.table)
            if progress:
                progress(total.seen)
        if len(bad) > MOST_BAD * total.seen:
            fact = (
                f"{len(bad):,} of {total.seen:,} rows are bad, more than {MOST_BAD:.0%}; the first: {bad[0]['reason']}"
            )
            raise DataError(prefix, fact, "mend or remove these rows: on_bad_row: skip is for a few")
        first = {"source": sample.source, "row": sample.to_row()} if sample else None
        kept = {"bad": len(bad), "bad_rows": bad, "sample": first, "verified": verified, "prefix": prefix}
        writer.finish({**vars(total), **kept})


def _blocks(rows: Iterable[NumberedRow]) -> Iterator[list[NumberedRow]]:
    block: list[NumberedRow] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row[1]) if isinstance(row[1], bytes) else 0
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _rendered(
    blocks: Iterator[list[NumberedRow]], job: Job, renderer: Renderer, every_row: bool
) -> Generator[Block, None, None]:
    """The blocks rendered, in order: here, or where there are many by processes, which end when it is closed."""
    first = list(islice(blocks, ALONE_BLOCKS))
    asked = (
        (block, -1 if every_row else VERIFIED_SAMPLE if n == 0 else 0) for n, block in enumerate(chain(first, blocks))
    )

    def here(block: tuple[list[NumberedRow], int]) -> Block:
        return render_block(renderer, job, *block)

    cores = n_cores()
    if len(first) < ALONE_BLOCKS or cores == 1:
        yield from map(here, asked)
        return
    few = cores <= FEW_CORES  # then this process renders, too
    with Workers(job, cores - 1 if few else cores) as workers:
        yield from workers.render(asked, here if few else None)
