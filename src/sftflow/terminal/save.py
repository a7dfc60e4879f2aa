"""A conversation as a row of a JSONL file, as `sftflow render` and `sftflow train` read it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftflow.chat.data_files import read_lines
from sftflow.chat.schema import Conversation, Message, conversation_of, text_message
from sftflow.foundation.errors import DataError, SftflowError


def row_of(systems: Sequence[str | None], messages: Sequence[Message]) -> dict[str, Any]:
    """The OpenAI shape. systems: the system prompt that each reply was made under, the last one's being the row's.

    Calculator calls stay parts. A reply that was cut has weight 0, and so has one made under another system prompt than
    the row's: history, nothing to learn.

    >>> row_of(["Be brief."], [text_message("user", "hi"), text_message("assistant", "Hi.")])["messages"][0]
    {'role': 'system', 'content': 'Be brief.'}
    """
    system = systems[-1]
    under = iter(systems)
    messages = [replace(m, weight=0) if m.role == "assistant" and next(under) != system else m for m in messages]
    opening = [text_message("system", system)] if system else []
    return Conversation((*opening, *messages)).to_row()


def append_row(path: Path, row: dict[str, Any]) -> int:
    """Add a row to a JSONL file of conversations, or begin one; the number of rows in it then.

    Raises DataError where the file is something else, which is left as it was, or cannot be written.
    """
    before = 0
    try:
        if path.exists():
            for before, (number, line) in enumerate(read_lines(str(path)), 1):  # noqa: B007  the count is the result
                conversation_of(line, f"{path}:{number}")
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            try:
                gap = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(gap + json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)  # a disk that is full takes half a row
                raise
    except OSError as error:
        remedy = (
            "choose another file" if path.parent.is_dir() else f"make the folder {path.parent}, or choose another file"
        )
        raise DataError(str(path), f"cannot be written ({error.strerror or error})", remedy) from None
    except SftflowError as error:
        fact = f"it is no JSONL file of conversations ({error.fact})"
        raise DataError(error.place or str(path), fact, "choose another file") from None
    return before + 1
