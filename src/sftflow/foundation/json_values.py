"""Values as JSON has them: what is read from a user's text or file, and must be writable again."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sftflow.foundation.errors import DataError, SchemaError

MOST_NESTED = 100
"""lists and objects inside each other; templates, and Python's own `json`, give up at some hundreds"""
_MOST_BITS = 14_000  # Python writes no integer of more than 4,300 digits
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class RepeatedKeyError(ValueError):
    """An object of a JSON text has one key twice."""


def loads(text: str) -> Any:
    """Parse JSON. Raises ValueError where it is none, and RepeatedKeyError where one key stands twice in an object, of
    which all but the last would be lost."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {twice!a} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


AS_JSON = "it is as Python shows a value, not JSON: write it with json.dumps"


def python_text(error: json.JSONDecodeError) -> bool:
    """Whether what JSON has not is how Python shows a value: as `str` of a list, or a table of lists written as CSV.

    >>> try: loads("[{'role': None}]")
    ... except json.JSONDecodeError as error: python_text(error)
    True
    """
    return error.doc.startswith(("'", "None", "True", "False"), error.pos)


def without_nulls(value: Any) -> Any:
    """An Arrow value without its nulls. All structs of a column have the same keys, so that a null stands for a key
    that the row does not have; one that was really there cannot be told from it. Nulls in lists stay.

    >>> without_nulls({"a": None, "b": [{"c": None}, None]})
    {'b': [{}, None]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words: "an object", "a list", "null" ...; another value by its type.

    >>> kind_of({}), kind_of(2.5), kind_of(b"")
    ('an object', 'a number', 'a value of type bytes')
    """
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def parse_json(text: bytes, place: str, *, whole: bool = False) -> Any:
    """A text in UTF-8 as the value that it is in JSON.   whole: it is a file's, of many lines.

    Raises DataError where it is none; where it has a key twice or a number of thousands of digits; and a line's, where
    it holds half a surrogate pair or is nested too deeply (of a whole file that is asked row by row: `check_texts`).
    """
    part = "file" if whole else "line"
    try:
        value = loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        fact = f"not UTF-8 text ({error.reason} at byte {error.start} of the {part})"
        raise DataError(place, fact, "save the file as UTF-8" + ("" if whole else ", or remove the line")) from None
    except json.JSONDecodeError as error:
        fact, remedy = f"not JSON ({error.msg} at column {error.colno})", "fix or remove the line"
        if not whole and text.lstrip()[:1] not in (b"{", b"["):  # another kind of file, most often
            remedy = "remove the line, or give a file whose lines are JSON objects"
        if python_text(error):
            remedy = AS_JSON
        if b"\0" in text:
            fact, remedy = "NUL bytes: it was not written to its end", "write or download it again, or remove the line"
        raise DataError(f"{place}:{error.lineno}" if whole else place, fact, remedy) from None
    except RepeatedKeyError as error:
        raise DataError(place, str(error), "keep one of them") from None
    except ValueError:
        raise DataError(place, "a number of more than 4,300 digits", "make it a string") from None
    except RecursionError:
        raise DataError(place, f"nested more than {MOST_NESTED} deep", "make it flatter, or remove the row") from None
    if not whole and (_ESCAPED_HALF.search(text) or text.count(b"[") + text.count(b"{") > MOST_NESTED):
        check_texts(value, place)
    return value


def check_texts(value: Any, place: str) -> None:
    """Raises DataError, naming the place inside the value, where a text in it is half a surrogate pair (no tokenizer
    takes it), or it is nested too deeply."""
    if fault := _fault(value, strict=False):
        raise DataError(place + fault[0], *fault[1:])


def check_plain(value: Any, place: str) -> None:
    """Raises SchemaError, naming the place inside the value, where it holds what JSON has not: half a surrogate pair
    (no tokenizer takes it), NaN, bytes, a date, a key that is no text; or is nested too deeply."""
    if fault := _fault(value):
        raise SchemaError(place + fault[0], *fault[1:])


def _fault(value: Any, depth: int = 0, *, strict: bool = True) -> tuple[str, str, str] | None:
    """(where inside the value, fact, remedy); None where it is plain.   strict: of kinds that JSON has, too."""
    kind = type(value)
    if kind is str:
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])[1:-1]
            return "", f"a lone surrogate, {half} at character {error.start}", "mend the text: it is half a character"
    elif kind is dict or kind is list:
        if depth == MOST_NESTED:
            return "", f"nested more than {MOST_NESTED} deep", "make it flatter, or remove the row"
        for key, inner in value.items() if kind is dict else enumerate(value):
            name = f"[{key}]"
            if kind is dict:
                if type(key) is not str and strict:
                    return "", f"the key {key!r} is not a text", "make it a string"
                name = f".{key}"
                if fault := _fault(key):
                    return "", f"a key holds {fault[1]}", fault[2]
            if fault := _fault(inner, depth + 1, strict=strict):
                return (name + fault[0])[:80], *fault[1:]
    elif kind is float:
        if strict and not math.isfinite(value):
            return "", f"{value} is not a number of JSON", "write another value"
    elif kind is int:
        if value.bit_length() > _MOST_BITS:
            return "", "a number of more than 4,300 digits", "make it a string"
    elif strict and value is not None and kind is not bool:
        return "", f"it is of type {kind.__name__}, which JSON has not", "make it a string"
    return None
