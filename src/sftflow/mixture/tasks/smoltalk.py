"""Conversations as they are: SmolTalk, or any set in a known dialect, from a file or the hub. For training only.

Also the three steps every real set begins with: `rows_of` reads, `text_of` checks, `sample` limits.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sftflow.chat.schema import Conversation, parse_row, read_rows
from sftflow.errors import SchemaError, TaskError
from sftflow.mixture.tasks.base import Item, Task

T = TypeVar("T")


class SmolTalk(Task):
    """Rows of any dialect `parse_row` knows; the row itself is the training conversation."""

    name = "smoltalk"

    def conversations(self, split: str = "train") -> list[Conversation]:
        return sample(self, (parse_row(row, place) for place, row in rows_of(self, split)))

    def items(self, split: str = "test") -> list[Item]:
        raise self._only_training()

    def grade(self, item: Item, reply: str) -> float:
        raise self._only_training()

    def _only_training(self) -> TaskError:
        return TaskError(self.name, "its replies have no grader, it is for training only", "leave it out of --tasks")


def path_of(task: Task, split: str) -> str:
    """The task's path; a hub id that names no split gets the one asked for.

    hub:owner/set, split test  ->  hub:owner/set:test        data/test.jsonl  ->  data/test.jsonl
    """
    path = task.source.path
    if not path:
        raise TaskError(task.name, "it needs a path", f"write {task.name}=PATH, or path: in the recipe")
    if path.startswith("hub:") and path.count(":") == 1:
        return f"{path}:{split}"
    return path


def rows_of(task: Task, split: str) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, raw row) of the task's set. A file is its own split: only hub ids use `split`."""
    return read_rows(path_of(task, split))


def sample(task: Task, rows: Iterable[T]) -> list[T]:
    """All rows, or `source.limit` of them drawn by task and seed, in the order of the file.

    A row's chance is one key drawn as it passes, and the smallest keys stay: rows beyond the limit are never held,
    and a larger limit keeps every row of a smaller one.
    """
    limit = task.source.limit
    if limit is None:
        return list(rows)
    rng = random.Random(f"{task.name}:{task.source.seed}")
    kept = heapq.nsmallest(limit, enumerate(rows), key=lambda _: rng.random())
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def text_of(row: Any, key: str, place: str, shape: str) -> str:
    """row[key] as a text that is not blank; `shape` is the row the error asks for."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise SchemaError(place, f"no text under {key!r}", f"write {shape}")
    return value
