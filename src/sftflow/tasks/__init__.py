"""The table of built-in tasks. A new task is one file beside this one and one row here."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path

from sftflow.foundation.errors import TaskError
from sftflow.foundation.missing import not_there
from sftflow.tasks.published import to_get
from sftflow.tasks.task import Item, Task, TaskSource, chance_of, is_pattern

TASKS = {
    "spelling": "spelling:Spelling",
    "spelling_bee": "spelling:SpellingBee",
    "arithmetic": "arithmetic:Arithmetic",
    "identity": "identity:Identity",
    "concepts": "concepts:Concepts",
    "formatting": "formatting:Formatting",
    "dialogue": "dialogue:Dialogue",
    "gsm8k": "gsm8k:Gsm8k",
    "mmlu": "mmlu:Mmlu",
    "arc": "multiple_choice:MultipleChoice",
    "arc_easy": "multiple_choice:MultipleChoice",
    "arc_challenge": "multiple_choice:MultipleChoice",
    "openbookqa": "multiple_choice:MultipleChoice",
    "boolq": "questions:Jsonl",
    "ifeval": "ifeval:IFEval",
    "jsonl": "questions:Jsonl",
    "humaneval": "humaneval:HumanEval",
    "smoltalk": "smoltalk:SmolTalk",
}
GENERATED = ("spelling", "spelling_bee", "arithmetic", "identity", "concepts", "formatting", "dialogue")


def make_task(name: str, source: TaskSource, place: str = "--tasks", path: str = "") -> Task:
    """The named task over a source of rows. Raises TaskError for an unknown name or a missing path.

    place: where the name was written.   path: what to do where its path is missing.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise TaskError(place, f"unknown task {name!r}", hint)
    module, cls = TASKS[name].split(":")
    if name not in GENERATED:
        if source.path is None:
            raise TaskError(place, f"the task {name} needs a path", (path or f"write {name}=PATH") + to_get(name))
        several = name == "mmlu" and is_pattern(source.path)
        if not (source.path.startswith("hub:") or several or Path(source.path).exists()):
            fact, remedy = not_there(source.path, f"file {source.path}", f"check the path{to_get(name)}")
            raise TaskError(place, f"{name}: {fact}", remedy)
    task: Task = getattr(import_module(f"sftflow.tasks.{module}"), cls)(source)
    task.name = name
    return task


__all__ = ["GENERATED", "TASKS", "Item", "Task", "TaskSource", "chance_of", "make_task"]
