"""Plain text: the documents of a file."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftflow.foundation.errors import DataError


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file: .txt (all of it is one) or .jsonl (the `text` of each line), either also as .xz.

    Raises DataError where there is no such file, or a line is no object with `text`.
    """
    name = path.name.removesuffix(".xz")
    if not path.is_file():
        raise DataError(str(path), "no such file", "give a .txt, .jsonl or .jsonl.xz file")
    opener: Any = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        if not name.endswith(".jsonl"):
            text = f.read()
            if text.strip():
                yield text
            return
        for number, line in enumerate(f, 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}", f"not a JSON object with `text` ({error})", "fix the line"
                ) from None
