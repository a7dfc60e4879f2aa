"""What a task is: a maker of training conversations and a grader of replies, side by side.

A new task is one file with a `Task` subclass and one row in `sftflow.mixture.tasks.TASKS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftflow.chat.schema import Conversation, Message, Part, text_message

DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where a task's rows come from: a path or hub id for real sets, a seed and a count for generated ones."""

    path: str | None = None
    seed: int = 0
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One graded question.

    id: stable within the task.   messages: what the user asks.   answer: what the grader needs, JSON-able.
    choices: the letters of a multiple-choice item ("A", "B", ...), empty where the reply is free text.
    plain: the same question as plain text, for a base that knows no chat format.
    """

    id: str
    messages: tuple[Message, ...]
    answer: Any
    choices: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        asked = "\n\n".join(m.text for m in self.messages if m.role != "assistant")
        return f"Question: {asked}\nAnswer:"


class Task:
    """Base of all tasks. Train and test rows are disjoint by construction or by the set's own splits."""

    name = ""
    max_new_tokens = 64

    def __init__(self, source: TaskSource) -> None:
        self.source = source

    def conversations(self, split: str = "train") -> list[Conversation]:
        """Training conversations, at most `source.limit`, deterministic in `source.seed`."""
        raise NotImplementedError

    def items(self, split: str = "test") -> list[Item]:
        """Graded questions of the held-out split, at most `source.limit`, deterministic in `source.seed`."""
        raise NotImplementedError

    def grade(self, item: Item, reply: str) -> float:
        """Score in 0..1 of a reply's text."""
        raise NotImplementedError


def chance_of(items: Sequence[Item]) -> float:
    """The score of guessing: mean of 1/choices over multiple-choice items, 0 for free text."""
    if not items:
        return 0.0
    return sum(1 / len(i.choices) if i.choices else 0.0 for i in items) / len(items)


def ask(question: str, reply: str | Sequence[Part], source: str) -> Conversation:
    """A one-turn conversation."""
    parts = (Part("text", reply),) if isinstance(reply, str) else tuple(reply)
    return Conversation((text_message("user", question), Message("assistant", parts)), (), {}, source)


def load_data(name: str) -> Any:
    """A JSON or JSONL file shipped with the package."""
    text = (DATA / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands commas and trailing zeros after the point.

    >>> last_number("so 1,200 + 3 = 1,203.00.")
    '1203'
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return normal_number(found[-1]) if found else None


def normal_number(text: str) -> str:
    value = text.replace(",", "").strip().rstrip(".").lstrip("$")
    if "." in value:
        value = value.rstrip("0").rstrip(".")
    return value
