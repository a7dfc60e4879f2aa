"""HumanEval: complete a Python function. Grading executes the reply against the row's tests, so it is not here yet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from sftflow.chat.schema import Conversation, text_message
from sftflow.errors import DataError, TaskError
from sftflow.mixture.tasks.base import Item, Task, ask, path_of, rows_of, sample, text_of

SHAPE = '{"prompt": ..., "canonical_solution": ..., "test": ..., "entry_point": ...}'


class HumanEval(Task):
    """The published HumanEval.jsonl (or .jsonl.gz), or any set with its columns."""

    name = "humaneval"
    max_new_tokens = 512

    def conversations(self, split: str = "train") -> list[Conversation]:
        return sample(self, (self._conversation(place, row) for place, row in self._rows(split)))

    def items(self, split: str = "test") -> list[Item]:
        return sample(self, (self._item(place, row) for place, row in self._rows(split)))

    def grade(self, item: Item, reply: str) -> float:
        raise TaskError(
            "humaneval", "grading runs model-written code and is not available yet", "leave it out of --tasks"
        )

    def _rows(self, split: str) -> Iterator[tuple[str, Any]]:
        path = path_of(self, split)
        return read_gzip(path) if path.endswith(".gz") else rows_of(self, split)

    def _conversation(self, place: str, row: Any) -> Conversation:
        code = text_of(row, "prompt", place, SHAPE)
        whole = code + text_of(row, "canonical_solution", place, SHAPE)
        return ask(question(code), fenced(whole), place)

    def _item(self, place: str, row: Any) -> Item:
        """answer: what a grader needs to run: {"prompt", "entry_point", "test"}."""
        answer = {key: text_of(row, key, place, SHAPE) for key in ("prompt", "entry_point", "test")}
        line = place.rpartition(":")[2]
        return Item(
            id=f"{self.name}:{line}", messages=(text_message("user", question(answer["prompt"])),), answer=answer
        )


def question(code: str) -> str:
    return f"Complete this Python function. Reply with the whole function.\n\n{fenced(code)}"


def fenced(code: str) -> str:
    """Code in a Markdown block, as assistants write it and as the grader will read it."""
    return f"```python\n{code.rstrip()}\n```"


def read_gzip(path: str) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, row) of a gzipped JSONL file, the form HumanEval is published in."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except FileNotFoundError:
        raise DataError(path, "no such file", "check the path") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}", f"not JSON ({error})", "fix or remove the line") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be unpacked ({error})", "download it again") from None
