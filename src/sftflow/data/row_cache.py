"""Where rendered rows are kept, and under which name.

key = hash of (data, tokenizer, format, what the recipe asks, the code of RENDERED_ROWS)
$SFTFLOW_CACHE/rows/KEY/    default ~/.cache/sftflow; SFTFLOW_CACHE=off keeps nothing
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from sftflow.data.render_pool import Job
from sftflow.fingerprint import RENDERED_ROWS, code_hash, hash_json
from sftflow.foundation.atomic_io import reason, sha256_file
from sftflow.recipe import Recipe, SourceEntry
from sftflow.tasks import TASKS

CACHE_BYTES = 20 << 30

log = logging.getLogger("sftflow.data")


def cache_folder(what: str = "rows") -> Path | None:
    """Where rendered rows (or something else) are kept; None where SFTFLOW_CACHE=off, and, which is said, where none is
    named and the usual place cannot be written."""
    named = os.environ.get("SFTFLOW_CACHE", "")
    if named:
        return None if named.lower() == "off" else Path(named) / what
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sftflow" / what
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError) as error:  # (RuntimeError: there is no home)
        _say_once(f"note: the cache cannot be written ({reason(error)}); nothing is kept (or set SFTFLOW_CACHE)")
        return None
    return folder


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)


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
    parts = [
        entry.model_dump(mode="json", exclude={"repeat", "name", "published"}),
        data,
        recipe.identity.model_dump(mode="json"),
        recipe.train.seed,
        asdict(job),
        code_hash(RENDERED_ROWS),
        RENDERED_ROWS.versions(),
    ]
    return hash_json(parts)


def prune(folder: Path, keep: Path) -> None:
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
