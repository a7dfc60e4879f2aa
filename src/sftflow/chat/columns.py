"""The names that a table has for what a row is made of: `columns: {question: prompt, answer: completion}`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sftflow.chat.files.table import value_of
from sftflow.chat.row_keys import PREFERENCE, READ, absent
from sftflow.foundation.errors import DataError, RecipeError, SchemaError
from sftflow.foundation.json_values import kind_of, parse_json

Columns = Mapping[str, str]
"""the table's name of a column -> ours. `a.b` is b inside the object a, where there is no column of that whole name"""


class Columned(NamedTuple):
    """A row as it stands (or its line's bytes) whose columns have other names."""

    row: Any
    columns: Columns


def fault_of(columns: Columns) -> str | None:
    """What is wrong with such names, as `fact; remedy`; None where nothing is.

    >>> fault_of({"a": "prompt", "b": "prompt"})
    'a and b are both called prompt; name one of them'
    """
    for column, name in columns.items():
        if name not in READ:
            near = difflib.get_close_matches(name, READ, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(READ)}"
            return f"{column}: {name!r} is no key of a row; {hint}"
        if same := [other for other in columns if other != column and columns[other] == name]:
            return f"{column} and {same[0]} are both called {name}; name one of them"
    return None


def parse_columns(text: str) -> dict[str, str]:
    """The command line's way to write them. Raises RecipeError.

    >>> parse_columns("question=prompt, answer=completion")
    {'question': 'prompt', 'answer': 'completion'}
    """
    said = [pair.rpartition("=") for pair in text.split(",")]
    if not all(column.strip() and name.strip() for column, _, name in said):
        raise RecipeError(f"--columns {text}", "it is not THEIRS=OURS,...", "write question=prompt,answer=completion")
    found = {column.strip(): name.strip() for column, _, name in said}
    if len(found) < len(said):
        raise RecipeError(f"--columns {text}", "one column has two names", "name it once")
    return found


def renamed(row: Any, columns: Columns, place: str, ignored: set[str]) -> tuple[dict[str, Any], frozenset[str]]:
    """The row under our names, and which of these are there. A column that had such a name already is `ignored`, and
    so are the other replies of preference data where one of them is named."""
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}, which has no columns", "leave out columns")
    found = {name: _value(row, column) for column, name in columns.items()}
    found |= {name: value_of(name, text) for name, text in found.items() if isinstance(text, str)}  # as in a cell
    found = {name: value for name, value in found.items() if not absent(value)}
    gone = {*columns, *found, *(PREFERENCE if not PREFERENCE.isdisjoint(columns) else ())}
    ignored |= {key for key in gone - columns.keys() if not absent(row.get(key))}
    return {**{key: value for key, value in row.items() if key not in gone}, **found}, frozenset(found)


def require_columns(rows: Iterable[Any], columns: Columns, place: str) -> None:
    """Raises DataError where no row has a column; rows are read until each was seen.   rows: objects, or lines' bytes,
    of which those that are not JSON are left to be named when they are read."""
    missing, there, row = set(columns), dict[str, None](), None
    for row in rows:
        if isinstance(row, bytes):
            try:
                row = parse_json(row, place)
            except DataError:
                continue
        if isinstance(row, dict):
            missing = {column for column in missing if column not in row and _value(row, column) is None}
            there.update(dict.fromkeys(map(str, row)) if len(there) < 50 else ())
        if not missing:
            return
    if row is None:  # which is said of an empty file elsewhere
        return
    names = ", ".join(there) or "none"
    first = next(column for column in columns if column in missing)
    raise DataError(place, f"no row has a column {first!r}", f"name one that is there: {names}")


def _value(row: dict[str, Any], column: str) -> Any:
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    return _value(row[outer], inner) if isinstance(row.get(outer), dict) else None
