"""The chat templates that TRL ships, each with its own control tokens: no row that is made of them may be wrong.

They come with the package trl (the extra `peers`); nothing of it is imported.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.judge import judge
from helpers.shapes import SHAPES
from helpers.trl import ABSENT, PATHS, parts_of, stops_of, tokenizer_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PATHS] or ABSENT)
def test_every_row_is_right(path: Path) -> None:
    line = judge(path, "byte-level", tokenizer_of(path), stops_of(path), SHAPES, parts=parts_of(path))
    print(line)
    assert not line.wrong, "\n".join(line.wrong)
