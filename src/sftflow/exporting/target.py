"""Where an export goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sftflow.foundation.errors import RecipeError


def require_replaceable(out: Path, is_ours: Callable[[], bool], what: str, kind: str) -> None:
    """Raises RecipeError where `out` lies below a file, or is there and not `what` we wrote: found out before the model
    is loaded.   is_ours: asked of what is there; it may raise where that cannot be read.   kind: "file" or "folder"."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RecipeError(f"--out {out}", f"{folder} is a file, not a folder", "choose another path")
    if not out.exists():
        return
    try:
        ours = is_ours()
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise RecipeError(f"--out {out}", f"it holds something other than {what}", f"name another {kind}")
