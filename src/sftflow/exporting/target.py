"""Where an export goes."""

from __future__ import annotations

from pathlib import Path

from sftflow.foundation.errors import RecipeError


def check_folder(out: Path) -> None:
    """Raises RecipeError where `out` lies below a file: found out before the model is loaded."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RecipeError(f"--out {out}", f"{folder} is a file", "name a folder")
