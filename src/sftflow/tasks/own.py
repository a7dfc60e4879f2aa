"""A task of one's own: a class in a file that the user names, `./tasks.py:riddles`, or hands over in Python.

The file is run, as `python tasks.py` would run it: naming it is what allows that. What its class makes is checked, and
an error in it is told by the file's line.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from sftflow.chat.schema import Conversation, Message, parse_row
from sftflow.foundation.atomic_io import digest_of
from sftflow.foundation.errors import SftflowError, TaskError, first_line
from sftflow.foundation.missing import not_there
from sftflow.tasks.task import Item, Task, TaskSource, sample

T = TypeVar("T")
WRITE = "class Riddles(Task) with conversations, or with items and grade (docs/tasks.md)"
MEND = "mend it; sftflow --debug shows the traceback"


class OwnTask(Task):
    """What stands in front of a user's class. files: its file, first, and the modules beside it that it imports; none
    of a class that was handed over.   stamp: what a grade of it rests on."""

    files: tuple[Path, ...] = ()
    stamp: str = ""
    place: str = ""
    graded: bool = True

    def conversations(self, split: str = "train") -> list[Conversation]:
        """Its rows: conversations, or rows as a data file has them."""
        make = super().conversations
        made: list[Any] = self._limited(self._asked("conversations", lambda: list(make(split))))
        for number, row in enumerate(made, 1):
            if isinstance(row, Conversation):
                made[number - 1] = row if row.source else replace(row, source=f"{self.name}:{number}")
            elif not isinstance(row, Mapping | list):
                fact = f"row {number} is {_kind(row)}, no conversation"
                raise self._wrong("conversations", fact, "make it with ask(question, reply), or as a data file has it")
        return made

    def items(self, split: str = "test") -> list[Item]:
        make = super().items
        made = self._limited(self._asked("items", lambda: list(make(split))))
        for number, item in enumerate(made, 1):
            if not isinstance(item, Item):
                fact = f"number {number} is {_kind(item)}, no Item"
            elif not (item.messages and all(isinstance(m, Message) for m in item.messages)):
                fact = f"the messages of item {item.id!r} are no Messages"
            elif not _as_json([item.id, item.answer, list(item.choices)]):
                fact = f"the answer of item {item.id!r} cannot be written as JSON"
            else:
                continue
            raise self._wrong("items", fact, "make it with make_item(id, question, answer)")
        if not self.graded and not all(item.choices for item in made):  # letters are told by their probabilities
            raise TaskError(self.place, "it has no grade", f"write {WRITE}")
        return made

    def grade(self, item: Item, reply: str) -> float:
        score: Any = self._asked("grade", partial(super().grade, item, reply))
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(score, str) or not 0 <= number <= 1:
            raise self._wrong("grade", f"{score!r:.60} for item {item.id} is no number in 0..1", "return one")
        return number

    def details(self, item: Item, reply: str) -> dict[str, Any]:
        return self._mapping("details", partial(super().details, item, reply), f" for item {item.id}")

    def examples(self, n: int) -> list[tuple[str, Conversation]]:
        """Its training conversations that ask none of its items: both may be of one file."""
        everything = copy.copy(self)
        everything.source = replace(self.source, limit=None)
        asked = {m.text for item in everything.items() for m in item.messages if m.role == "user"}
        rows: list[tuple[str, Any]] = super().examples(n)
        made = [(g, r if isinstance(r, Conversation) else parse_row(r, f"{self.name}: examples")) for g, r in rows]
        return [(g, c) for g, c in made if asked.isdisjoint(m.text for m in c.messages)]

    def examples_path(self) -> str | None:
        """Its path as it is: which of its rows are for training, a user's class says itself."""
        return self.source.path

    def metrics(self, details: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        return self._mapping("metrics", partial(super().metrics, details))

    def provenance(self) -> dict[str, str]:
        return {**self._mapping("provenance", super().provenance), "own task": self.stamp}

    def _mapping(self, method: str, ask: Callable[[], Any], of: str = "") -> dict[str, Any]:
        found = self._asked(method, ask)
        if not (isinstance(found, dict) and _as_json(found)):
            raise self._wrong(method, f"it gives no mapping that JSON can hold{of}", "return one")
        return found

    def _limited(self, made: list[T]) -> list[T]:
        """At most `source.limit` of what a class has made that does not look at it."""
        limit = self.source.limit
        return made if limit is None or len(made) <= limit else sample(self, made)

    def _asked(self, method: str, ask: Callable[[], T]) -> T:
        with telling(f"{method}: ", self.files):
            return ask()

    def _wrong(self, method: str, fact: str, remedy: str) -> TaskError:
        code = getattr(getattr(type(self).__mro__[2], method), "__code__", None)
        place = f"{code.co_filename}:{code.co_firstlineno}" if code and self.files else self.name
        return TaskError(place, f"{method}: {fact}", remedy)


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _as_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# ---- opening one


def class_in_file(file: str, name: str, place: str) -> type[Task]:
    """The class of that name, or whose tasks have that `name`, in a file. Raises TaskError where there is none.

    place: where it was named.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise TaskError(place, *not_there(path, f"file {file}"))
    files = files_of(path)
    module = _run(files, digest_of(part.read_bytes() for part in files))
    made = dict.fromkeys(v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Task))
    there = [cls for cls in made if not cls.__module__.startswith("sftflow.")]
    found = [cls for cls in there if cls.__name__ == name] or [cls for cls in there if name_of(cls) == name]
    if found:
        return _checked(found[0], files, digest_of(part.read_bytes() for part in files))
    if name and name in vars(module):
        raise TaskError(f"{file}:{name}", "it is no Task", f"write {WRITE}")
    names = [cls.__name__ for cls in there]
    near = difflib.get_close_matches(name, [*names, *map(name_of, there)], 1) if name else []
    remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}" if names else f"write {WRITE}"
    fact = f"no task {name!r} in it" if name else "which of its tasks is not said"
    raise TaskError(file, fact, f"{remedy}; write {file}:{names[0]}" if names and not name else remedy)


def given(task: type[Task] | Task, source: TaskSource) -> Task:
    """A class or an instance that was handed over in Python, as a task. An instance keeps its own source, and the
    smaller of both limits."""
    stamp = secrets.token_hex(8)  # what else its code rests on is not known, so no grade of it is taken over
    if isinstance(task, type):
        return made_of(_checked(task, (), stamp), source)
    made = object.__new__(_checked(type(task), (), stamp))
    made.__dict__.update(vars(task))
    own = getattr(task, "source", source)
    made.source = replace(own, limit=min((x for x in (own.limit, source.limit) if x is not None), default=None))
    made.n_rows = None
    made.name = name_of(type(task), getattr(task, "name", ""))
    return made


def made_of(cls: type[Task], source: TaskSource) -> Task:
    """A user's class called with a source. Raises TaskError where it does not stand that."""
    with telling(f"{cls.__name__}: ", getattr(cls, "files", ())):
        task = cls(source)
    task.source, task.name = source, name_of(cls)
    return task


def name_of(cls: type[Task], said: str = "") -> str:
    """What a user's task is called: the `name` that their class gives, else the name of the class."""
    theirs = (vars(c) for c in cls.__mro__ if not c.__module__.startswith("sftflow."))
    own = next((names["name"] for names in theirs if "name" in names), "")
    return str(said or own or cls.__name__)


def _checked(cls: type[Task], files: tuple[Path, ...], stamp: str) -> type[Task]:
    """The class with OwnTask in front. Raises TaskError for one that is no whole task."""
    place = f"{files[0]}:{cls.__name__}" if files else cls.__name__
    if not issubclass(cls, Task):
        raise TaskError(place, "it is no Task", f"write {WRITE}")
    has = {method: getattr(cls, method) is not getattr(Task, method) for method in ("conversations", "items", "grade")}
    if has["grade"] and not has["items"]:
        raise TaskError(place, "it has no items", f"write {WRITE}")
    if not any(has.values()):
        raise TaskError(place, "it has neither conversations nor items", f"write {WRITE}")
    longest: Any = cls.max_new_tokens
    if not (isinstance(longest, property) or (type(longest) is int and longest > 0)):
        raise TaskError(place, f"max_new_tokens is {longest!r:.60}, no whole number above 0", "write for example 256")
    name = name_of(cls)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TaskError(place, f"its name {name!r} is no name of a file", "write letters, digits, - and _")
    own = {"files": files, "stamp": stamp, "place": place, "graded": has["grade"], "__module__": cls.__module__}
    return type(cls.__name__, (OwnTask, cls), own)


# ---- running its file


def files_of(path: Path) -> tuple[Path, ...]:
    """A file, and the modules in its folder that it imports, and so on: what its code is.

    Raises TaskError where one is not Python.
    """
    found: dict[Path, None] = {}
    todo = [path.resolve()]
    while todo:
        file = todo.pop(0)
        if file in found or not file.is_file():
            continue
        found[file] = None
        with telling("", (file,)):
            tree = ast.parse(file.read_bytes(), str(file))
        for node in ast.walk(tree):
            base, names = path.resolve().parent, [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                base = file.parents[node.level - 1] if node.level else base
                names = [".".join(filter(None, (node.module, a.name))) for a in node.names]
            for parts in (name.split(".") for name in names):
                for n in range(1, len(parts) + 1):  # the packages that a module is in are run, too
                    below = base.joinpath(*parts[:n])
                    todo += [below.with_suffix(".py"), below / "__init__.py"]
    return tuple(found)


_folders: list[str] = []
"""those of the files that were run, at the end of sys.path: no installed package is hidden by what lies in them"""


@cache
def _run(files: tuple[Path, ...], digest: str) -> ModuleType:
    """The module of a file, run once for each content of its files; it may import what lies beside it.

    Raises TaskError for what its code raises, and where a name means another module than the one beside it.
    """
    path = files[0]
    folder = str(path.parent)
    module = ModuleType(f"own_tasks_{path.stem}_{digest}")
    module.__file__ = str(path)
    beside = {".".join(f.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): f for f in files[1:]}
    _forget(beside)
    kept = [p for p in sys.path if p not in _folders]
    _folders[:] = [folder, *(p for p in _folders if p != folder)]
    sys.path[:] = [*kept, *(p for p in _folders if p not in kept)]
    sys.modules[module.__name__] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a .pyc may be that of another content
    try:
        with telling("", files):
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        for name, file in beside.items():
            imported = str(getattr(sys.modules.get(name), "__file__", None) or file)
            if Path(imported).resolve() != file:
                raise TaskError(str(path), f"import {name} gives {imported}, not {file.name} beside it", "rename that")
    except BaseException:
        del sys.modules[module.__name__]
        raise
    finally:
        sys.dont_write_bytecode = written
    return module


def _forget(beside: Mapping[str, Path]) -> None:
    """Let modules be imported anew that another content, or another of the user's files, has under these names."""
    for name, file in beside.items():
        was = getattr(sys.modules.get(name), "__file__", None)
        if was and (was == str(file) or any(Path(folder) in Path(was).parents for folder in _folders)):
            del sys.modules[name]


@contextmanager
def telling(doing: str, files: Sequence[Path]) -> Iterator[None]:
    """An error of the user's code as a TaskError, by the last of its own lines that it passed.

    doing: what comes before it in the fact.   files: of the user's code; none: whatever is not this package's.
    """
    try:
        yield
    except (SftflowError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        own = {str(file) for file in files}
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(__file__).parents[1]
        passed = [f for f in frames if (f.filename in own if own else ours not in Path(f.filename).parents)]
        place = f"{passed[-1].filename}:{passed[-1].lineno}" if passed else str(next(iter(files), "own task"))
        if isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        said = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise TaskError(place, f"{doing}{type(error).__name__}{f': {said}' if said else ''}", MEND) from error
