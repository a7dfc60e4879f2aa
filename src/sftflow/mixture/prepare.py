"""A source of the mixture -> its rendered rows on disk: read in blocks, rendered on all cores, cached by content.

key = hash of (data, tokenizer, format, what the recipe asks, this code)
$SFTFLOW_CACHE/rows/KEY/    default ~/.cache/sftflow; SFTFLOW_CACHE=off keeps nothing
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sftflow import __version__
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, parse_line, parse_row, read_rows
from sftflow.errors import DataError, RunError, SftflowError
from sftflow.files import sha256_file, write_directory
from sftflow.mixture.rows import Rows, RowWriter
from sftflow.mixture.tasks import TASKS, TaskSource, make_task
from sftflow.mixture.worker import Block, Item, Job, Workers, n_cores, render_block
from sftflow.recipe import Recipe, SourceEntry

BLOCK_ROWS, BLOCK_BYTES = 256, 1 << 20
ALONE_BLOCKS = 6  # a source of fewer blocks is rendered here: processes would take longer to start
MANY_BYTES = 2 << 20  # a file of more lines than that is not
FEW_CORES = 4
VERIFIED_SAMPLE = 32  # rows of a source that are verified where not all of them shall be
MOST_BAD = 0.05  # more bad rows than this share are an error even where bad rows are skipped
CACHE_BYTES = 20 << 30

Progress = Callable[[str, int], None]


def prepare_source(
    entry: SourceEntry, number: int, recipe: Recipe, renderer: Renderer, *, every_row: bool, progress: Progress | None
) -> Rows:
    """The rendered rows of mixture entry `number`. every_row: verify each of them, not only a sample.

    Raises the first bad row's error (on_bad_row: stop), or DataError where more than 5% of the rows are bad.
    """
    prefix = _prefix(entry)
    job = Job(renderer.spec, prefix, recipe.train.max_length, recipe.train.overlong, recipe.on_bad_row)

    def fill(directory: Path) -> None:
        _render(
            items_of(entry, recipe),
            job,
            renderer,
            directory,
            entry.label,
            many=_is_many(entry),
            every_row=every_row,
            progress=progress,
        )

    def opened(directory: Path) -> Rows:
        return Rows(directory, name=entry.label, number=number, prefix=prefix)

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
    _prune(folder, keep=place)
    return opened(place)


# ---- reading


def items_of(entry: SourceEntry, recipe: Recipe) -> Iterator[Item]:
    """(number, payload) of each row of a mixture entry, a sample of `limit` of them where it asks for one."""
    if entry.source in TASKS:
        options = {"identity": recipe.identity.model_dump()}
        source = TaskSource(path=entry.path, seed=recipe.train.seed, limit=entry.limit, options=options)
        yield from enumerate(make_task(entry.source, source, "mixture").conversations(entry.split), 1)
        return
    name = entry.path or entry.source
    rows = functools.partial(_lines, name) if _is_lines(name) else functools.partial(_numbered, name)
    chosen: frozenset[int] | None = None
    if entry.limit is not None:
        n = sum(1 for _ in rows())
        if entry.limit < n:
            chosen = frozenset(random.Random(recipe.train.seed).sample(range(n), entry.limit))
    empty = True
    for i, item in enumerate(rows()):
        empty = False
        if chosen is None or i in chosen:
            yield item
    if empty:
        raise DataError(name, "no rows in it", "give a file with conversations")


def _is_many(entry: SourceEntry) -> bool:
    name = entry.path or entry.source
    return entry.source not in TASKS and entry.limit is None and _is_lines(name) and _size(name) > MANY_BYTES


def _size(name: str) -> int:
    try:
        return os.path.getsize(name)
    except OSError:
        return 0  # reading it will say what is wrong


def _is_lines(name: str) -> bool:
    return not name.startswith("hub:") and Path(name).suffix not in (".json", ".parquet")


def _lines(name: str) -> Iterator[Item]:
    """(line number, bytes) of the lines that are not blank."""
    path = Path(name)
    if not path.is_file():
        raise DataError(name, "no such file", "check the path; a hub data set is written hub:OWNER/NAME")
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(name, f"cannot be read ({error.strerror or error})", "check the file") from None


def _numbered(name: str) -> Iterator[Item]:
    for place, row in read_rows(name):
        yield int(place.rpartition(":")[2]), row


def _prefix(entry: SourceEntry) -> str:
    return entry.source if entry.source in TASKS else entry.path or entry.source


def sample_of(entry: SourceEntry, recipe: Recipe, n: int) -> list[Conversation]:
    """The first `n` rows of an entry that can be read."""
    out: list[Conversation] = []
    for number, payload in islice(items_of(entry, recipe), n):
        place = f"{_prefix(entry)}:{number}"
        try:
            if isinstance(payload, Conversation):
                out.append(payload)
            else:
                out.append(parse_row(parse_line(payload, place) if isinstance(payload, bytes) else payload, place))
        except SftflowError:
            continue  # it will be named, or skipped, when the rows are rendered
    return out


# ---- rendering


def _blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    block: list[Item] = []
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
    items: Iterable[Item],
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

    def asked(some: Iterable[list[Item]], verify: int) -> Iterator[tuple[list[Item], int]]:
        for block in some:
            yield block, -1 if every_row else verify
            verify = 0

    total = _Total()
    with contextlib.ExitStack() as stack:
        writer = RowWriter(directory)
        stack.callback(writer.abandon)
        every = asked(chain(first, blocks), VERIFIED_SAMPLE)

        def here(block: tuple[list[Item], int]) -> Block:
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
        (directory / "sample.json").write_text(json.dumps(_to_json(total.sample)), encoding="utf-8")
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


# ---- the cache


def cache_folder() -> Path | None:
    """Where rendered rows are kept; None where SFTFLOW_CACHE=off."""
    named = os.environ.get("SFTFLOW_CACHE", "")
    if named.lower() == "off":
        return None
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sftflow"
    return base / "rows"


@functools.cache
def _code_version() -> str:
    """One hash of the code and data that make rows."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(__version__.encode())
    for folder in ("chat", "mixture"):
        for path in sorted((package / folder).rglob("*")):
            if path.suffix in (".py", ".jinja", ".json", ".jsonl", ".txt"):
                digest.update(str(path.relative_to(package)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_key(entry: SourceEntry, recipe: Recipe, job: Job) -> str | None:
    """What the rows depend on, as one hash; None where the data cannot be hashed (a hub data set)."""
    name = entry.path if entry.source in TASKS else entry.path or entry.source
    data = ""
    if name is not None:
        if name.startswith("hub:"):
            return None
        path = Path(name)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        try:
            data = " ".join(f"{p}={sha256_file(p)}" for p in files)
        except OSError:
            return None  # reading the rows will say what is wrong
    chat_format = job.spec.format
    parts = [
        entry.model_dump(mode="json", exclude={"repeat", "name"}),
        data,
        recipe.identity.model_dump(mode="json"),
        recipe.train.seed,
        job.prefix,
        job.max_length,
        job.overlong,
        job.on_bad_row,
        hashlib.sha256(job.spec.tokenizer.encode()).hexdigest(),
        job.spec.names,
        job.spec.eos,
        chat_format.template,
        chat_format.to_json(),
        chat_format.end,
        _code_version(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _prune(folder: Path, keep: Path) -> None:
    """Remove what was not used for longest until the cache fits its limit."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another run may be removing it, too
            entries.append((path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= CACHE_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size


# ---- the sample conversation of a source


def _to_json(conversation: Conversation | None) -> Any:
    if conversation is None:
        return None
    messages = []
    for m in conversation.messages:
        message: dict[str, Any] = {"role": m.role, "content": [{"type": p.kind, "text": p.text} for p in m.parts]}
        if not m.parts:
            message["content"] = None
        for key in ("tool_call_id", "name", "reasoning_content"):
            if getattr(m, key) is not None:
                message[key] = getattr(m, key)
        if m.tool_calls:
            message["tool_calls"] = list(m.tool_calls)
        if m.role == "assistant":
            message["weight"] = m.weight
        messages.append(message)
    return {"source": conversation.source, "row": {"messages": messages, "tools": list(conversation.tools)}}


def sample_conversation(rows: Rows) -> Conversation | None:
    """The first row of a source that was rendered, as it was rendered."""
    data = json.loads((rows.directory / "sample.json").read_text(encoding="utf-8"))
    return parse_row(data["row"], data["source"]) if data else None


def bad_rows(rows: Rows) -> list[dict[str, Any]]:
    """The quarantined rows of a source: source, reason, row."""
    text = (rows.directory / "bad.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
