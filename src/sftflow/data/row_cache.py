"""Where rendered rows are kept, and under which name.

key = hash of (data, tokenizer, format, what the recipe asks, the code of RENDERED_ROWS)
$SFTFLOW_CACHE/rows/KEY/          default ~/.cache/sftflow; SFTFLOW_CACHE=off keeps nothing
                    KEY.proven/   where every row was verified, not only a sample
                    KEY.I-of-N/   a part of the rows (`parts.py`), all verified

A name says what is in it, so nothing is ever written over, and any number of processes and machines may share a folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from sftflow.chat.files.names import files_of, is_pattern
from sftflow.chat.files.sets import HUB, DataFile, parse_set, pinned
from sftflow.data.parts import is_part
from sftflow.data.render_pool import Job
from sftflow.data.sources import data_name, made_digest
from sftflow.fingerprint import RENDERED_ROWS, code_hash, hash_json
from sftflow.foundation.atomic_io import reason, remove_directory, require_writable, sha256_file
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.errors import DataError
from sftflow.recipe import Recipe, SourceEntry, own_task
from sftflow.tasks import is_task
from sftflow.tasks.identity import identity_of

CACHE_BYTES = 20 << 30
LEFT_SECONDS = 7 * 86_400


def shared_cache() -> Path:
    """Where rendered rows are kept for other processes to find. Raises DataError where that cannot be."""
    folder = cache_folder()
    remedy = "set SFTFLOW_CACHE to a folder that all parts and the training share"
    if folder is None:
        raise DataError("--part", "nothing is kept here, so nobody would find the part", remedy)
    try:
        require_writable(folder / "part")
    except OSError as error:
        raise DataError(str(folder), f"a part cannot be kept here ({reason(error)})", remedy) from None
    return folder


def _files_of(entry: SourceEntry) -> list[DataFile]:
    """The files of an entry's data; none where it is made here."""
    if not is_task(entry.source) or entry.path is None or is_pattern(entry.path):
        name = data_name(entry)
        return [] if name is None else files_of(name, plain=entry.is_text)
    where = parse_set(entry.path).where if entry.path.startswith(HUB) else entry.path
    if not os.path.isdir(where):
        return [DataFile(entry.path, commit=pinned(entry.path) if where != entry.path else "")]
    return [DataFile(str(p)) for p in sorted(Path(where).rglob("*")) if p.is_file()]  # which of them it reads, it says


def stamps_of(entry: SourceEntry, recipe: Recipe) -> list[object]:
    """What tells that an entry's files were written to: name, size and time of each; [] where one cannot be read. Of
    a user's task, a hash of its rows."""
    if own_task(entry.source):
        return [made_digest(entry, recipe)]
    try:
        stats = [(file.place, file.path().stat()) for file in _files_of(entry) if not file.commit]
    except (OSError, DataError):
        return []
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def cache_key(entry: SourceEntry, recipe: Recipe, job: Job, stamps: list[object]) -> str | None:
    """What the rows depend on, as one hash; None where the data cannot be hashed. (Of a set on the hub the commit says
    what is in its files.)

    stamps: see `stamps_of`."""
    try:
        data = " ".join(f"{f.place}={f.commit or sha256_file(f.path())}" for f in _files_of(entry))
        data += str(stamps) if own_task(entry.source) else ""
    except (OSError, DataError):
        return None  # reading the rows will say what is wrong
    parts = [
        entry.model_dump(mode="json", exclude={"repeat", "name", "published"}),
        data,
        identity_of(recipe.model_dump(mode="json")) if entry.source == "identity" else None,
        recipe.train.seed,
        asdict(job),
        code_hash(RENDERED_ROWS),
        RENDERED_ROWS.versions(),
    ]
    return hash_json(parts)


def is_whole(path: Path) -> bool:
    """Whether a store is there, all of it."""
    return (path / "meta.json").is_file()


def prune(folder: Path, keep: Collection[Path]) -> None:
    """Remove what was not used for longest until the cache fits its limit, and what a killed process left long ago.

    What was used in the last week stays in a folder that the user has named, for others may be at work on it, and
    anywhere if it is a part, or still being written."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another run may be removing it, too
            entries.append((path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
    total, named = sum(size for _, size, _ in entries), bool(os.environ.get("SFTFLOW_CACHE"))
    for used, size, path in sorted(entries):
        unfinished = path.name.startswith(".")
        recent = time.time() - used < LEFT_SECONDS
        stays = path in keep or (recent and (unfinished or named or is_part(path.name)))
        if not stays and (unfinished or total > CACHE_BYTES):
            with contextlib.suppress(OSError):
                remove_directory(path)
                total -= size
