"""Data of others: public data sets, tokenizers and chat templates that are not part of the project.

The environment variable SFTFLOW_TEST_DATA names the folder that has them (CONTRIBUTING.md tells where they are from).
Without it the tests that need them skip, with one reason.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "SFTFLOW_TEST_DATA"
NOT_SET = f"outside data: {VARIABLE} names no folder"
FOLDER = Path(os.environ[VARIABLE]).resolve() if os.environ.get(VARIABLE) else None


def outside(*parts: str) -> Path:
    """A path in the outside data; the test skips where it is absent."""
    if FOLDER is None:
        pytest.skip(NOT_SET)
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"outside data: {VARIABLE} has no {'/'.join(parts)}")
    return path


def outside_files(folder: str, pattern: str) -> list[Path]:
    """The files there, sorted; [] where the data are absent."""
    return sorted((FOLDER / folder).glob(pattern)) if FOLDER else []


def each(files: list[Path]) -> list[Any]:
    """The files as parameters of a test, named by their stem; one that skips where there is none.

    >>> @pytest.mark.parametrize("path", each(outside_files("fixtures/chat_templates", "*/*.jinja")))  # doctest: +SKIP
    """
    return [pytest.param(path, id=path.stem) for path in files] or [
        pytest.param(None, id="none", marks=pytest.mark.skip(reason=NOT_SET))
    ]


class Tokenizers(dict[str, Path]):
    """Directories of tokenizers by name: "hf_llama2", "hf_llama3_1", "hf_qwen3". Without outside data there are none,
    and the test that asks for one skips."""

    def __missing__(self, name: str) -> Path:
        return outside("fixtures", "tokenizers", name)
