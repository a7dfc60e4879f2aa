"""The table of built-in tasks (a new one is one file beside this one and one row here), and what a task of one's own is
written with: docs/tasks.md."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path

from sftflow.chat.files.names import is_pattern
from sftflow.foundation.errors import TaskError
from sftflow.foundation.missing import not_there
from sftflow.recipe import own_task
from sftflow.tasks.answers import answer_of, final_number, holds_text, same_number, same_text
from sftflow.tasks.own import class_in_file, made_of, name_of
from sftflow.tasks.published import to_get
from sftflow.tasks.task import Item, Task, TaskSource, ask, chance_of, is_test_case, make_item, rows_of, sample

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
    "mmlu_pro": "mmlu:MmluPro",
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


def is_task(name: str) -> bool:
    """Whether a source's name is a task's: a built-in one, or one in a file (`./tasks.py:riddles`)."""
    return name in TASKS or own_task(name) is not None


def own_class(name: str, place: str) -> type[Task]:
    """The class that `./tasks.py:riddles` names. Raises TaskError where it is not there, or bears a built-in's name."""
    file, wanted = own_task(name) or (name, "")
    found = class_in_file(file, wanted, place)
    if (called := name_of(found)) in TASKS:
        raise TaskError(f"{file}:{wanted}", f"its name {called!r} is a built-in task's", "give it a name of its own")
    return found


def make_task(name: str, source: TaskSource, place: str = "--tasks", path: str = "") -> Task:
    """The named task over a source of rows. Raises TaskError for an unknown name or a missing path.

    place: where the name was written.   path: what to do where its path is missing.
    """
    if own_task(name) or name.endswith(".py"):
        return made_of(own_class(name, place), source)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise TaskError(place, f"unknown task {name!r}", hint)
    module, cls = TASKS[name].split(":")
    if name not in GENERATED:
        if source.path is None:
            raise TaskError(place, f"the task {name} needs a path", (path or f"write {name}=PATH") + to_get(name))
        if not (source.path.startswith("hub:") or is_pattern(source.path) or Path(source.path).exists()):
            fact, remedy = not_there(source.path, f"file {source.path}", f"check the path{to_get(name)}")
            raise TaskError(place, f"{name}: {fact}", remedy)
    task: Task = getattr(import_module(f"sftflow.tasks.{module}"), cls)(source)
    task.name = name
    return task


__all__ = [
    "GENERATED",
    "TASKS",
    "Item",
    "Task",
    "TaskSource",
    "answer_of",
    "ask",
    "chance_of",
    "final_number",
    "holds_text",
    "is_task",
    "is_test_case",
    "make_item",
    "make_task",
    "own_class",
    "rows_of",
    "same_number",
    "same_text",
    "sample",
]
