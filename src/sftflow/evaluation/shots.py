"""Examples in front of an item (`--shots N`): as earlier turns of the same chat, or as blocks of plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

from sftflow.chat.schema import Conversation, Message
from sftflow.foundation.errors import TaskError
from sftflow.tasks import Item, Task
from sftflow.tasks.task import as_plain_text

Shots = tuple[Conversation, ...]


def shots_for(task: Task, items: Sequence[Item], n: int, seed: int) -> tuple[Shots, ...]:
    """For each item `n` of the task's examples, of its group, drawn once for all models; none asks what the item does.

    Raises TaskError where the task has no examples, or too few.
    """
    try:
        pool = task.examples(n)
    except TaskError as error:
        remedy = f"{error.remedy}, or " if error.remedy and error.place == task.name else ""
        fact = f"it has no examples for --shots ({error.fact})"
        raise TaskError(task.name, fact, f"{remedy}ask it in a run without --shots") from error
    random.Random(f"{task.name}:shots:{seed}").shuffle(pool)
    groups: dict[str, list[tuple[set[str], Conversation]]] = {}
    for group, example in pool:
        if example.messages and example.messages[-1].role == "assistant":
            groups.setdefault(group, []).append((_asked(example.messages), example))
    out = []
    for item in items:
        group, asked = task.group_of(item), _asked(item.messages)
        chosen = tuple(islice((e for questions, e in groups.get(group, ()) if not questions & asked), n))
        if len(chosen) < n:
            of = f" of {group}" if group else ""
            raise TaskError(task.name, f"it has {len(chosen)} examples{of} for --shots {n}", "lower --shots")
        out.append(chosen)
    return tuple(out)


def _asked(messages: Sequence[Message]) -> set[str]:
    return {" ".join(m.text.casefold().split()) for m in messages if m.role == "user"}


def as_turns(shots: Shots, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The examples as earlier turns; a system message of the item's stays in front."""
    lead = 1 if messages[0].role in ("system", "developer") else 0
    return (*messages[:lead], *(m for example in shots for m in example.messages), *messages[lead:])


def as_text(shots: Shots, plain: str) -> str:
    r"""The examples as blocks of plain text in front of an item's.

    "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:"
    """
    blocks = [f"{as_plain_text(example.messages[:-1])} {example.messages[-1].text}" for example in shots]
    return "\n\n".join([*blocks, plain])
