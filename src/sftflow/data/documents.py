"""Plain text: the documents of a file."""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from pathlib import Path

from sftflow.chat.files.packed import readable
from sftflow.chat.schema import parse_line
from sftflow.foundation.errors import DataError


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file: .txt (all of it is one) or .jsonl (the `text` of each line), either also as .xz.

    Raises DataError where the file cannot be read, or a line is no object with `text`.
    """
    name = path.name.lower().removesuffix(".xz")
    try:
        with readable(path), lzma.open(path) if path.suffix.lower() == ".xz" else path.open("rb") as f:
            if not name.endswith(".jsonl"):
                text = io.TextIOWrapper(f, encoding="utf-8").read()
                if text.strip():
                    yield text
                return
            for number, line in enumerate(f, 1):
                row = parse_line(line, f"{path}:{number}")
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise DataError(f"{path}:{number}", "not a JSON object with `text`", "fix the line")
                yield row["text"]
    except lzma.LZMAError as error:
        raise DataError(
            str(path), f"cannot be unpacked ({error})", "download it again, or name it as what it is"
        ) from None
