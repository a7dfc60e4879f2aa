"""What models are asked: tasks by their names, and the items that every model gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from sftflow.checkpoint import load_info, resolve
from sftflow.foundation.errors import TaskError
from sftflow.recipe import SourceEntry
from sftflow.tasks import GENERATED, Item, Task, TaskSource, make_task
from sftflow.tasks.own import given

TaskLike: TypeAlias = str | SourceEntry | type[Task] | Task
"""a task as the command line names it, as a mixture has it, or a class of one's own, or an instance"""
Arm = Literal["chat", "plain"]
"""how a model is asked: in its chat format, or as plain text"""
PLAIN_STOPS = ("\n\n", *Task.plain_stops)  # of the replies that nothing but eyes and a judge grade
NO_TASK = "none"
SEED = 1234  # of the items: fixed, so that every model answers the same ones


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A task with the items that every model is asked.

    limit: as it was asked for.   available: how many items there are without it; None: as many as `items`.
    """

    name: str
    task: Task
    items: tuple[Item, ...]
    limit: int | None = None
    available: int | None = None

    @property
    def by_letter(self) -> bool:
        """Whether it is answered by the probabilities of letters instead of a generated reply."""
        return all(item.choices for item in self.items)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """tasks: several or one (`TaskLike`); None: the generated ones; `none`, or an empty list: no task.
    limit: items of each.
    allow_code: whether code that the model wrote may be run.
    identity: name and maker that the identity task asks for; None: those that the model's own recipe taught it."""

    tasks: Sequence[TaskLike] | TaskLike | None
    limit: int | None = None
    allow_code: bool = False
    identity: Mapping[str, str] | None = None

    def open(self, model: str) -> list[EvalTask]:
        """The tasks as they are asked of the model of that name. Raises as `open_tasks` does."""
        identity = self.identity
        if not identity:
            identity = (load_info(resolve(model)).get("recipe") or {}).get("identity")
        asked = GENERATED if self.tasks is None else self.tasks
        tasks = [asked] if isinstance(asked, str | SourceEntry | type | Task) else list(asked)
        names = [task.strip() if isinstance(task, str) else _said(task) for task in tasks]
        if NO_TASK in names and len(names) > 1:
            fact = f"{NO_TASK!r} stands beside other tasks: {', '.join(names)}"
            raise TaskError("--tasks", fact, f"name tasks, or give {NO_TASK} alone")
        return open_tasks([] if names == [NO_TASK] else tasks, self.limit, identity, allow_code=self.allow_code)


def open_tasks(
    specs: Sequence[TaskLike], limit: int | None, identity: Mapping[str, str] | None = None, *, allow_code: bool = False
) -> list[EvalTask]:
    """Tasks as they were named (`name`, `name=PATH` ...) with their items. A name that comes again gets its file's name
    behind it.

    Raises TaskError for an unknown one, and for one that runs code where that is not allowed.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise TaskError("--limit", f"it should be a whole number above 0 (given: {limit!r})", "None asks all items")
    out: list[EvalTask] = []
    options = {"identity": identity} if identity else {}
    for said in specs:
        spec = _said(said)
        name, _, path = (part.strip() for part in spec.partition("="))
        source = TaskSource(path=path or None, seed=SEED, limit=limit, options=options)
        if isinstance(said, SourceEntry):
            source = replace(source, limit=min(said.limit or limit or 0, limit or said.limit or 0) or None)
        task = make_task(name, source) if isinstance(said, str | SourceEntry) else given(said, source)
        name = task.name
        if task.runs_code and not allow_code:
            raise TaskError(name, "it runs code that the model wrote", "allow that with --allow-code (docs/sandbox.md)")
        items = tuple(task.items("test"))
        if not items:
            raise TaskError(spec, "no items to ask", "check its file")
        taken = {other.name for other in out}
        if name in taken and path:
            name = f"{name}-{Path(path).stem}"
        if name in taken:
            raise TaskError(spec, "the task is named twice", "leave one out")
        out.append(EvalTask(name=name, task=task, items=items, limit=limit, available=_available(task, items)))
    return out


def _said(task: TaskLike) -> str:
    """How a task is named: `name` or `name=PATH`."""
    if isinstance(task, SourceEntry):
        return f"{task.source}={task.path}" if task.path else task.source
    if isinstance(task, str):
        return task
    return task.__name__ if isinstance(task, type) else type(task).__name__


def _available(task: Task, items: Sequence[Item]) -> int:
    """How many items the task has without its limit."""
    if task.source.limit is None:
        return len(items)
    if task.n_rows is not None:
        return task.n_rows
    return max(len(items), len(type(task)(replace(task.source, limit=None)).items("test")))
