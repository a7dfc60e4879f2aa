"""What models are asked: tasks by their names, and the items that every model gets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sftflow.checkpoint import load_info, resolve
from sftflow.evaluation.shots import Shots, shots_for
from sftflow.foundation.errors import TaskError
from sftflow.recipe import SourceEntry
from sftflow.tasks import GENERATED, Item, Task, TaskSource, make_task
from sftflow.tasks.identity import identity_of
from sftflow.tasks.own import given

TaskLike: TypeAlias = str | SourceEntry | type[Task] | Task
"""a task as the command line names it, as a mixture has it, or a class of one's own, or an instance"""
Arm = Literal["chat", "plain"]
"""how a model is asked: in its chat format, or as plain text"""
PLAIN_STOPS = ("\n\n", *Task.plain_stops)  # of the replies that nothing but eyes and a judge grade
NO_TASK = "none"
SEED = 1234  # of the items: fixed, so that every model answers the same ones


@dataclass(frozen=True, kw_only=True)
class How:
    """How items are asked.

    shots: examples in front of each.   samples: replies to each, drawn at this temperature; 0 is greedy.
    max_tokens: of a reply; None: as many as the task has it.   thinking: whether the chat template is to ask for
    thoughts; None: as it stands.
    """

    shots: int = 0
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    thinking: bool | None = None

    def require_valid(self) -> None:
        """Raises TaskError for a value that cannot be."""
        for name, least in (("shots", 0), ("samples", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                fact = f"it should be a whole number, {least} or more (given: {value!r})"
                raise TaskError(f"--{name.replace('_', '-')}", fact, "correct it")
        given = self.temperature
        if isinstance(given, bool) or not isinstance(given, int | float) or not (given == 0 or 1e-4 <= given <= 100):
            fact = f"it should be 0, which is greedy, or a number from 0.0001 to 100 (given: {given!r})"
            raise TaskError("--temperature", fact, "correct it")
        if self.samples > 1 and self.temperature == 0:
            fact = "at temperature 0 all replies to an item are the same"
            raise TaskError("--samples", fact, "give --temperature, for example 0.7")

    def told(self) -> str:
        """What is not as usual, in words; "" where all is."""
        words = [f"{self.shots} example{'s' * (self.shots > 1)} in front"] if self.shots else []
        words += [f"{self.samples} replies to an item"] if self.samples > 1 else []
        words += [f"temperature {self.temperature:g}"] if self.temperature else []
        words += [f"at most {self.max_tokens:,} tokens"] if self.max_tokens else []
        words += [f"thinking {'on' if self.thinking else 'off'}"] if self.thinking is not None else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A task with the items that every model is asked.

    limit: as it was asked for.   available: how many items there are without it; None: as many as `items`.
    how: how they are asked.   shots: what stands in front of each item; () where nothing does.
    """

    name: str
    task: Task
    items: tuple[Item, ...]
    limit: int | None = None
    available: int | None = None
    how: How = How()
    shots: tuple[Shots, ...] = ()

    @property
    def max_new_tokens(self) -> int:
        return self.how.max_tokens or self.task.max_new_tokens

    @property
    def n_replies(self) -> int:
        """How many replies a model is asked for."""
        return len(self.items) * self.how.samples

    @property
    def by_letter(self) -> bool:
        """Whether it is answered by the probabilities of letters instead of a generated reply."""
        return all(item.choices for item in self.items)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """tasks: several or one (`TaskLike`); None: the generated ones; `none`, or an empty list: no task.
    limit: items of each.
    allow_code: whether code that the model wrote may be run.   how: see `How`.
    identity: what the identity task asks for (`identity_of`); None: what the model's own recipe taught it."""

    tasks: Sequence[TaskLike] | TaskLike | None
    limit: int | None = None
    allow_code: bool = False
    identity: Mapping[str, Any] | None = None
    how: How = How()

    def open(self, model: str) -> list[EvalTask]:
        """The tasks as they are asked of the model of that name. Raises as `open_tasks` does."""
        identity = self.identity
        if not identity:
            recipe = load_info(resolve(model)).get("recipe")
            identity = identity_of(recipe) if isinstance(recipe, dict) else None
        asked = GENERATED if self.tasks is None else self.tasks
        tasks = [asked] if isinstance(asked, str | SourceEntry | type | Task) else list(asked)
        names = [task.strip() if isinstance(task, str) else _said(task) for task in tasks]
        if NO_TASK in names and len(names) > 1:
            fact = f"{NO_TASK!r} stands beside other tasks: {', '.join(names)}"
            raise TaskError("--tasks", fact, f"name tasks, or give {NO_TASK} alone")
        specs = [] if names == [NO_TASK] else tasks
        return open_tasks(specs, self.limit, identity, allow_code=self.allow_code, how=self.how)


def open_tasks(
    specs: Sequence[TaskLike],
    limit: int | None,
    identity: Mapping[str, Any] | None = None,
    *,
    allow_code: bool = False,
    how: How = How(),
) -> list[EvalTask]:
    """Tasks as they were named (`name`, `name=PATH` ...) with their items. A name that comes again gets its file's name
    behind it.

    Raises TaskError for an unknown one, for one that runs code where that is not allowed, and for one that cannot be
    asked so.
    """
    how.require_valid()
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
        shots = shots_for(task, items, how.shots, SEED) if how.shots else ()
        available = _available(task, items)
        out.append(EvalTask(name=name, task=task, items=items, limit=limit, available=available, how=how, shots=shots))
        if out[-1].by_letter and (how.temperature or how.thinking):
            fact = "it is answered by the probabilities of its letters, behind the prompt"
            option = "--temperature" if how.temperature else "--thinking on"
            raise TaskError(name, fact, f"ask it in a run without {option}")
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
    whole = copy.copy(task)  # one's own may have been made with more than a source
    whole.source = replace(task.source, limit=None)
    return max(len(items), len(whole.items("test")))
