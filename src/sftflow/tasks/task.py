"""What a task is: a maker of training conversations and a grader of replies, side by side.

A new task is one file with a `Task` subclass and one row in `sftflow.tasks.TASKS`.

The steps every real set begins with are here, too: `rows_of` reads, `text_of` checks, `sample` limits.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from sftflow.chat.data_files import read_rows
from sftflow.chat.files.names import is_pattern
from sftflow.chat.files.sets import HUB, is_set, parse_set, set_name
from sftflow.chat.schema import Conversation, Message, Part, text_message
from sftflow.foundation.errors import SchemaError, TaskError

_SPLIT = re.compile(r"(?<![A-Za-z])(?:test|validation|valid|val|dev)(?![A-Za-z])", re.I)
DATA = Path(__file__).parent / "data"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where a task's rows come from: a path or hub id for real sets, a seed and a count for generated ones.

    config: of a set with several configurations, where its path does not name it."""

    path: str | None = None
    config: str | None = None
    seed: int = 0
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One graded question.

    id: stable within the task.   messages: what the user asks.   answer: what the grader needs, JSON-able.
    choices: the letters of a multiple-choice item ("A", "B", ...), empty where the reply is free text.
    plain: the same question as plain text, for a base that knows no chat format; `plain_text` where the usual
    "Question: ... Answer:" is not how such a text would stand in the world.
    """

    id: str
    messages: tuple[Message, ...]
    answer: Any
    choices: tuple[str, ...] = ()
    plain_text: str | None = None

    @property
    def plain(self) -> str:
        if self.plain_text is not None:
            return self.plain_text
        return as_plain_text(self.messages)


def as_plain_text(messages: Sequence[Message]) -> str:
    r"""A chat as plain text for a base, up to the reply: a question, or the dialogue so far.

    >>> as_plain_text([text_message("user", "My cat is Tip."), text_message("user", "Who is Tip?")])
    'Question: My cat is Tip.\n\nWho is Tip?\nAnswer:'
    >>> as_plain_text([text_message(*m) for m in (("user", "Hi!"), ("assistant", "Hello."), ("user", "Well?"))])
    'Question: Hi!\nAnswer: Hello.\nQuestion: Well?\nAnswer:'
    """
    if all(m.role != "assistant" for m in messages):
        asked = "\n\n".join(m.text for m in messages)
        return f"Question: {asked}\nAnswer:"
    names = {"user": "Question: ", "assistant": "Answer: "}
    return "\n".join([*(names.get(m.role, "") + m.text for m in messages), "Answer:"])


class Task:
    """Base of all tasks. Train and test rows are disjoint by construction or by the set's own splits.

    A task that only trains or only evaluates leaves the other out, and says so where it is asked for it.
    """

    name = ""
    max_new_tokens = 64
    runs_code = False
    """whether grading executes what the model wrote; such tasks need `--allow-code`"""
    plain_stops: tuple[str, ...] = ("\nQuestion:",)
    """where a reply in plain text ends: a base goes on with a question of its own"""
    plain_paragraph = True
    """whether a reply in plain text is also graded as far as its first blank line, behind which a base often goes on
    with something else; the better grade counts, so that neither reading makes a base look worse than it is"""

    example_splits: tuple[str, ...] = ("train", "dev", "validation", "val")
    """of a published set, from which examples for `--shots` are drawn: the first that is there"""

    n_rows: int | None = None
    """how many rows the split has without the limit, once `sample` has seen them"""

    def __init__(self, source: TaskSource) -> None:
        self.source = source

    def id_of(self, place: str) -> str:
        """What the item at FILE:LINE is called: by its line, and where the task has several files by its file, too.

        >>> task = Task(TaskSource(path="data/*.jsonl"))
        >>> task.id_of("data/*.jsonl:17"), task.id_of("data/a.jsonl:17")
        (':17', ':a.jsonl:17')
        >>> Task(TaskSource(path="hub:o/n@main:test")).id_of("hub:o/n/data/test.parquet:3")
        ':data/test.parquet:3'
        """
        file, _, line = place.rpartition(":")
        if file == self.source.path:
            return f"{self.name}:{line}"
        named = self.source.path or ""
        if named.startswith(HUB):
            asked = parse_set(named)
            named = asked.where if asked.is_folder else HUB + asked.where
        fixed = re.split(r"[*?[]", named)[0]
        folder = f"{named}/" if fixed == named else fixed[: fixed.rfind("/") + 1]
        return f"{self.name}:{file.removeprefix(folder)}:{line}"

    def conversations(self, split: str = "train") -> list[Conversation]:
        """Training conversations, at most `source.limit`, deterministic in `source.seed`."""
        fact = "it has no replies to learn from, it is for evaluation only"
        raise TaskError(self.name, fact, "leave it out of the mixture")

    def items(self, split: str = "test") -> list[Item]:
        """Graded questions of the held-out split, at most `source.limit`, deterministic in `source.seed`."""
        raise self._no_grader()

    def grade(self, item: Item, reply: str) -> float:
        """Score in 0..1 of a reply's text."""
        raise self._no_grader()

    def examples(self, n: int) -> list[tuple[str, Conversation]]:
        """What the `n` examples of `--shots` are drawn from: (group, exchange); an item is shown those of its own group
        (`group_of`). Raises TaskError where there are none."""
        return [("", c) for c in self.of_examples(16 * n).conversations("train")]

    def of_examples(self, limit: int | None) -> Self:
        """The task over the set that its examples are of; all of it where that is a file, else `limit` of it."""
        task, path = copy.copy(self), self.examples_path()
        task.source = replace(self.source, path=path, limit=limit if path is None else None)
        return task

    def examples_path(self) -> str | None:
        """Where the examples of a set are: its train split on the hub, or the file beside it that is called so. None
        for a task without a path."""
        path = self.source.path
        if path is None:
            return None
        if path.startswith("hub:"):
            named = parse_set(path)
            return str(named._replace(split=self.example_splits[0])) if named.split else path
        if self.source.config or is_set(path):
            return path  # a folder of several splits, of which the one that is asked for is read
        whole = Path(path)
        for split in self.example_splits:
            last, folder = (_SPLIT.sub(partial(_in_case, split), part) for part in (whole.name, whole.parent.name))
            for found in (whole.parent / last, whole.parent.parent / folder / last):
                if found != whole and (found.exists() or (is_pattern(str(found)) and glob.glob(str(found)))):
                    return str(found)
        fact = f"no file beside {path} is called as it is with {' or '.join(self.example_splits)} in place of test"
        raise TaskError(self.name, fact, "put its examples there")

    def group_of(self, item: Item) -> str:
        """The group of examples that an item is shown, such as its subject."""
        return ""

    def _no_grader(self) -> TaskError:
        return TaskError(
            self.name, "its replies have no grader, it is for training only", "leave it out of the tasks that are asked"
        )

    def details(self, item: Item, reply: str) -> dict[str, Any]:
        """What the grader found beside the score, JSON-able: {"strict": 0.0, "flexible": 1.0}."""
        return {}

    def provenance(self) -> dict[str, str]:
        """What of this machine can change a grade, so that rows graded with another are not mixed in:
        {"sandbox": "bubblewrap"}."""
        return {}

    def metrics(self, details: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Figures of the whole task out of every row's details: the mean of each that is a number.

        A float is a share or another measure, an int a count. {} where there are no rows.
        """
        names = dict.fromkeys(k for row in details for k, v in row.items() if isinstance(v, (int, float)))
        return {k: sum(float(row.get(k, 0.0)) for row in details) / len(details) for k in names}


def chance_of(items: Sequence[Item]) -> float:
    """The score of guessing: mean of 1/choices over multiple-choice items, 0 for free text."""
    return sum(1 / len(i.choices) if i.choices else 0.0 for i in items) / max(1, len(items))


def ask(question: str, reply: str | Sequence[Part], source: str = "") -> Conversation:
    """A one-turn conversation.   source: where it came from, as errors shall name it."""
    parts = (Part("text", reply),) if isinstance(reply, str) else tuple(reply)
    return Conversation((text_message("user", question), Message("assistant", parts)), (), {}, source)


def numbered(task: Task, rows: Iterable[tuple[str, str | Sequence[Part]]]) -> list[Conversation]:
    """One-turn conversations of (question, reply), whose source is the task's name and their number from 1."""
    return [ask(question, reply, f"{task.name}:{n}") for n, (question, reply) in enumerate(rows, 1)]


def make_item(identity: str, asked: str, answer: Any, **more: Any) -> Item:
    """An item of one user message.   more: `choices`, `plain_text`."""
    return Item(id=identity, messages=(text_message("user", asked),), answer=answer, **more)


def is_test_case(case: str, one_in: int) -> bool:
    """Whether a generated case belongs to the test split: one in so many do, told by the SHA-256 of the case itself."""
    return hashlib.sha256(case.encode()).digest()[0] % one_in == 0


def path_of(task: Task, split: str) -> str:
    """The task's path; a data set (on the hub, or a folder of several splits) that names no split gets the one that is
    asked for.

    hub:owner/set, split test  ->  hub:owner/set:test        data/test.jsonl  ->  data/test.jsonl
    """
    path = task.source.path
    if not path:
        raise TaskError(task.name, "it needs a path", f"write {task.name}=PATH")
    if path.startswith("hub:") or task.source.config or is_set(path):
        named = parse_set(path if path.startswith("hub:") else f"hub:{path}").split
        return set_name(path, task.source.config, named or split)
    return path


def _in_case(word: str, found: re.Match[str]) -> str:
    """train in place of test, and Train in place of Test."""
    return word.capitalize() if found[0][0].isupper() else word


def rows_of(task: Task, split: str) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, raw row) of the task's set. A file is its own split: only data sets use `split`."""
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
    n_rows = 0

    def key(_: tuple[int, T]) -> float:
        nonlocal n_rows
        n_rows += 1
        return rng.random()

    kept = heapq.nsmallest(limit, enumerate(rows), key=key)
    task.n_rows = n_rows
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def text_of(row: Any, key: str, place: str, shape: str) -> str:
    """row[key] as a text that is not blank; `shape` is the row the error asks for."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise SchemaError(place, f"no text under {key!r}", f"write {shape}")
    return value


def load_data(name: str) -> Any:
    """A JSON or JSONL file shipped with the package."""
    text = (DATA / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)
