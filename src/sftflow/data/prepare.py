"""A source of the mixture -> its rendered rows on disk: read in blocks, rendered on all cores, cached by content."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sftflow.atomic_io import write_directory
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.data.render_pool import Block, Job, SourceItem, Workers, n_cores, render_block
from sftflow.data.row_cache import cache_folder, cache_key, prune
from sftflow.data.sources import is_many, place_of, rows_of_entry
from sftflow.data.store import RowStore, RowWriter
from sftflow.errors import DataError, RunError
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
    prefix = place_of(entry)
    job = Job(renderer.spec, prefix, recipe.train.max_length, recipe.train.overlong, recipe.on_bad_row)

    def fill(directory: Path) -> None:
        _render(
            rows_of_entry(entry, recipe),
            job,
            renderer,
            directory,
            entry.label,
            many=is_many(entry),
            every_row=every_row,
            progress=progress,
        )

    def opened(directory: Path) -> RowStore:
        return RowStore(directory, name=entry.label, number=number, prefix=prefix)

    key = cache_key(entry, recipe, job)
    folder = cache_folder()
    if key is None or folder is None:
        directory = Path(tempfile.mkdtemp(prefix="sftflow-rows-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        fill(directory)
        return opened(directory)
    place = folder / key
    if (place / "meta.json").is_file():
        rows = opened(place)
        if rows.meta["verified"] == "all" or not every_row:
            with contextlib.suppress(OSError):  # a cache that is shared and read-only
                os.utime(place)
            return rows
    try:
        write_directory(place, fill)
    except OSError as error:
        raise RunError(
            str(place), f"cannot write ({error.strerror or error})", "free space, or set SFTFLOW_CACHE"
        ) from error
    prune(folder, keep=place)
    return opened(place)


# ---- rendering


def _blocks(items: Iterable[SourceItem]) -> Iterator[list[SourceItem]]:
    block: list[SourceItem] = []
    size = 0
    for item in items:
        block.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _render(
    items: Iterable[SourceItem],
    job: Job,
    renderer: Renderer,
    directory: Path,
    label: str,
    *,
    many: bool,
    every_row: bool,
    progress: Progress | None,
) -> None:
    """Render all rows into a store in `directory`. many: whether they are known to be worth starting processes."""
    blocks = _blocks(items)
    first = [] if many else list(islice(blocks, ALONE_BLOCKS))

    def asked(some: Iterable[list[SourceItem]], verify: int) -> Iterator[tuple[list[SourceItem], int]]:
        for block in some:
            yield block, -1 if every_row else verify
            verify = 0

    total = _Total()
    with contextlib.ExitStack() as stack:
        writer = RowWriter(directory)
        stack.callback(writer.abandon)
        every = asked(chain(first, blocks), VERIFIED_SAMPLE)

        def here(block: tuple[list[SourceItem], int]) -> Block:
            return render_block(renderer, job, *block)

        cores = n_cores()
        if (not many and len(first) < ALONE_BLOCKS) or cores == 1:
            results: Iterator[Block] = map(here, every)
        elif cores <= FEW_CORES:  # on few cores this process renders, too
            results = stack.enter_context(Workers(job, cores - 1)).render(every, here)
        else:
            results = stack.enter_context(Workers(job, cores)).render(every)
        for result in results:
            if result.error is not None:
                raise result.error
            total.add(result)
            writer.append(result.ids, result.mask, result.table)
            if progress:
                progress(label, total.counts["seen"])
        total.check(job.prefix)
        meta = {**total.counts, "verified": "all" if every_row else "sample", "prefix": job.prefix}
        with (directory / "bad.jsonl").open("w", encoding="utf-8") as f:
            for n, reason, row in total.bad:
                f.write(json.dumps({"source": f"{job.prefix}:{n}", "reason": reason, "row": row}) + "\n")
        sample = {"source": total.sample.source, "row": total.sample.to_row()} if total.sample else None
        (directory / "sample.json").write_text(json.dumps(sample), encoding="utf-8")
        writer.close(meta)


class _Total:
    """The sums over a source's blocks."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {
            "seen": 0,
            "cut": 0,
            "expanded": 0,
            "boundary_splits": 0,
            "dropped": {},
            "bad": 0,
            "invariants": {},
        }
        self.bad: list[tuple[int, str, Any]] = []
        self.sample: Conversation | None = None

    def add(self, block: Block) -> None:
        for key in ("seen", "cut", "expanded", "boundary_splits"):
            self.counts[key] += getattr(block, key)
        for why, n in block.dropped.items():
            self.counts["dropped"][why] = self.counts["dropped"].get(why, 0) + n
        for name, mine in block.invariants.items():
            entry = self.counts["invariants"].setdefault(name, {"checked": 0, "failed": 0, "first": None})
            entry["checked"] += mine["checked"]
            entry["failed"] += mine["failed"]
            entry["first"] = entry["first"] or mine["first"]
        self.bad += block.bad
        self.counts["bad"] = len(self.bad)
        self.sample = self.sample or block.sample

    def check(self, prefix: str) -> None:
        """Raises DataError where too many rows are bad."""
        seen, bad = self.counts["seen"], len(self.bad)
        if bad > MOST_BAD * seen:
            raise DataError(
                prefix,
                f"{bad:,} of {seen:,} rows are bad, more than {MOST_BAD:.0%}; the first: {self.bad[0][1]}",
                "mend the data",
            )


# ---- the sample conversation of a source


def sample_conversation(rows: RowStore) -> Conversation | None:
    """The first row of a source that was rendered, as it was rendered."""
    data = json.loads((rows.directory / "sample.json").read_text(encoding="utf-8"))
    return parse_row(data["row"], data["source"]) if data else None


def bad_rows(rows: RowStore) -> list[dict[str, Any]]:
    """The quarantined rows of a source: source, reason, row."""
    text = (rows.directory / "bad.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
