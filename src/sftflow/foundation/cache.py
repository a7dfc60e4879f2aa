"""Where is kept what can be made or asked again: below $SFTFLOW_CACHE, or ~/.cache/sftflow."""

from __future__ import annotations

import errno
import functools
import logging
import os
from pathlib import Path

from sftflow.foundation.atomic_io import reason

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
        say_once(f"note: the cache cannot be written ({reason(error)}); nothing is kept (or set SFTFLOW_CACHE)")
        return None
    return folder


@functools.cache
def say_once(text: str) -> None:
    log.warning(text)
