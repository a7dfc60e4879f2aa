"""Tool calls in a reply's text, read as it comes: text and calls, in order.

    reader = CallReader(call_format, tools)
    reader.feed('Let me look.\\n<tool_call>\\n{"na')               ->  ["Let me look."]
    reader.feed('me": "look", "arguments": {}}\\n</tool_call>.')  ->  [Call("look", {})]
    reader.flush()                                               ->  ["."]

What turns out not to be a call of a tool that was offered is text. Blanks in the format's own words may differ from
the template's. The pieces together are the same however the text was cut.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.chat.streaming import held_back

Path = tuple[str | int, ...]
Types = Mapping[str, Mapping[str, str]]
_BLANKS = re.compile(r"\s*")
# What stands for a call's identity in the words below. Nine letters: some templates insist on that.
IDENTITIES = ("zqidentia", "zqidentib")
_IDENTITY = re.compile(r"[\w-]*")


@dataclass(frozen=True)
class JsonEntry:
    """A call is one JSON object: where in it name and arguments are."""

    name: Path
    arguments: Path


@dataclass(frozen=True)
class NamedEntry:
    """A call is its name, `middle`, and its arguments as a JSON object."""

    middle: str


@dataclass(frozen=True)
class TaggedEntry:
    """A call is its name, `first`, and for each argument key, `middle`, value; `again` in front of a further one,
    `last` behind the last. none: what follows the name where there are no arguments."""

    first: str
    middle: str
    again: str
    last: str
    none: str


@dataclass(frozen=True)
class CallFormat:
    """open, entry, (between, entry)*, close. between: None where the format takes one call only."""

    open: str
    entry: JsonEntry | NamedEntry | TaggedEntry
    between: str | None
    close: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


class _NotACall(Exception): ...


class _NeedsMore(Exception):
    """Whether it is a call depends on what comes."""


class CallReader:
    """Takes a reply's text apart. tools: those that were offered, in the OpenAI shape."""

    def __init__(self, call_format: CallFormat, tools: Sequence[dict[str, Any]]) -> None:
        self._format = call_format
        self._types = {t["function"]["name"]: _types(t["function"]) for t in tools}
        words = call_format.open.split()
        self._first = words[0] if words else ""
        self._text = ""  # what has not been given out
        self.n_read = 0  # characters in front of it
        self.texts: list[tuple[int, int]] = []  # which of them were given out as texts
        self._begun = False  # whether anything has
        self._after_call = False  # the blanks behind a call are the format's

    def feed(self, piece: str) -> list[str | Call]:
        """What is certain after this piece of the text."""
        self._text += piece
        return self._take(final=False)

    def flush(self) -> list[str | Call]:
        """Nothing more comes: what was held back."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> list[str | Call]:
        out: list[str | Call] = []
        at = 0  # in front of it no call begins
        while True:
            if self._after_call:
                self._drop(len(self._text) - len(self._text.lstrip()))
            start = self._candidate(at)
            if start is None:
                held = 0 if final else held_back(self._text, [self._first])
                self._give(out, self._text[: len(self._text) - held], cut=not final)
                return out
            cursor = _Cursor(self._text, start, final)
            try:
                calls = self._calls(cursor)
            except _NeedsMore:
                self._give(out, self._text[:start], cut=True)
                return out
            except _NotACall:
                at = start + 1
                continue
            rest = self._text[cursor.at :]
            self._give(out, self._text[:start], cut=True)
            out += calls
            self._drop(len(self._text) - len(rest))
            self._begun, self._after_call, at = True, True, 0

    def _candidate(self, at: int) -> int | None:
        """The next place where a call might begin. Where the format opens it with nothing that a text shows, only a
        reply's very beginning is one."""
        if self._first:
            found = self._text.find(self._first, at)
            return found if found >= 0 else None
        return 0 if at == 0 and not self._begun and self._text.strip() else None

    def _give(self, out: list[str | Call], text: str, *, cut: bool) -> None:
        """Give a text out; with `cut`, without the blanks at its end, which a call would swallow."""
        text = text.rstrip() if cut else text
        if text:
            out.append(text)
            self.texts.append((self.n_read, self.n_read + len(text)))
            self._drop(len(text))
            self._begun, self._after_call = True, False

    def _drop(self, n: int) -> None:
        self._text, self.n_read = self._text[n:], self.n_read + n

    def _calls(self, cursor: _Cursor) -> list[str | Call]:
        cursor.words(self._format.open)
        calls: list[str | Call] = [self._entry(cursor)]
        while self._format.between is not None:
            at = cursor.at
            try:
                cursor.words(self._format.between)
                calls.append(self._entry(cursor))
            except _NotACall:
                cursor.at = at
                break
        at = cursor.at
        try:
            cursor.words(self._format.close)
        except _NotACall:  # the reply's end closes it as well, in the middle of a word too
            rest = self._format.close.split()
            cut = "".join(rest).startswith("".join(cursor.text[at:].split()))
            cursor.at = len(cursor.text) if cut else at
        return calls

    def _entry(self, cursor: _Cursor) -> Call:
        entry = self._format.entry
        if isinstance(entry, JsonEntry):
            value = cursor.json_object()
            name, arguments = _at(value, entry.name), _at(value, entry.arguments)
            if not isinstance(name, str) or name not in self._types:
                raise _NotACall
            if isinstance(arguments, str):
                arguments = _Cursor(arguments, 0, True).json_object()
            if not isinstance(arguments, dict | None):
                raise _NotACall
            return Call(name, arguments or {})
        name = cursor.one_of(self._types)
        if isinstance(entry, NamedEntry):
            cursor.words(entry.middle)
            return Call(name, cursor.json_object())
        return Call(name, self._tagged(entry, cursor, self._types[name]))

    def _tagged(self, entry: TaggedEntry, cursor: _Cursor, types: Mapping[str, str]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if not cursor.try_words(entry.first):
            cursor.words(entry.none)
            return arguments
        while True:
            key = cursor.until(entry.middle).strip()
            value = cursor.until(entry.last, after=entry.middle)
            arguments[key] = value if types.get(key) == "string" else _value(value)
            if not cursor.try_words(entry.again):
                cursor.words(entry.last)
                return arguments


class _Cursor:
    """A place in a text. Methods read on from it, or raise _NotACall, or, while more text may come, _NeedsMore."""

    def __init__(self, text: str, at: int, final: bool) -> None:
        self.text, self.at, self.final = text, at, final

    def words(self, wanted: str) -> None:
        """The format's own words, with whatever blanks between them."""
        for word, is_identity in _words(wanted):
            at = _end(_BLANKS, self.text, self.at)
            if is_identity:
                self.at = _end(_IDENTITY, self.text, at)
            elif self.text.startswith(word, at):
                self.at = at + len(word)
            else:
                self._fail(word.startswith(self.text[at:]))

    def try_words(self, wanted: str) -> bool:
        at = self.at
        try:
            self.words(wanted)
        except _NotACall:
            self.at = at
            return False
        return True

    def one_of(self, names: Sequence[str] | Types) -> str:
        at = _end(_BLANKS, self.text, self.at)
        rest = self.text[at:]
        if not self.final and any(name.startswith(rest) for name in names):
            raise _NeedsMore  # of two names one may begin the other
        found = max((name for name in names if rest.startswith(name)), key=len, default=None)
        if found is None:
            raise _NotACall
        self.at = at + len(found)
        return found

    def json_object(self) -> dict[str, Any]:
        at = _end(_BLANKS, self.text, self.at)
        if not self.text.startswith("{", at):
            self._fail(at == len(self.text))
        try:
            value, self.at = _DECODER.raw_decode(self.text, at)
        except (ValueError, RecursionError):
            self._fail(True)
        return dict(value)

    def until(self, wanted: str, *, after: str = "") -> str:
        """The text in front of the first of these words, without the blanks that the template puts there; a value is
        left at its end, a key's `wanted` is read over. after: what was read before."""
        word = wanted.split()[0] if wanted.split() else wanted
        end = self.text.find(word, self.at)
        if end < 0:
            self._fail(True)
        found = self.text[self.at : end]
        self.at = end
        if not after:
            self.words(wanted)
            return found
        return found.removeprefix(after[len(after.rstrip()) :]).removesuffix(
            wanted[: len(wanted) - len(wanted.lstrip())]
        )

    def _fail(self, may_come: bool) -> None:
        raise _NeedsMore if may_come and not self.final else _NotACall


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _finite(digits: str) -> float:
    """JSON sets no bound to a number; one that no float holds would be handed on as Infinity, which is no JSON."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(digits)
    return value


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)


@functools.lru_cache(maxsize=256)
def _words(text: str) -> tuple[tuple[str, bool], ...]:
    """The words of a text, and whether each stands for a call's identity, which is another every time."""
    pieces = (piece for word in text.split() for piece in re.split(f"({'|'.join(IDENTITIES)})", word))
    return tuple((piece, piece in IDENTITIES) for piece in pieces if piece)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _at(value: Any, path: Path) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _value(text: str) -> Any:
    """A tagged value that is no string: JSON where it is JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return text


def _types(function: Mapping[str, Any]) -> dict[str, str]:
    """The JSON types of a tool's parameters, where it says them."""
    properties = (function.get("parameters") or {}).get("properties")
    if not isinstance(properties, dict):
        return {}
    return {k: v["type"] for k, v in properties.items() if isinstance(v, dict) and isinstance(v.get("type"), str)}


def read_calls(
    call_format: CallFormat, tools: Sequence[dict[str, Any]], text: str
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """A whole text: what of it is text, and its calls."""
    reader = CallReader(call_format, tools)
    pieces = reader.feed(text) + reader.flush()
    calls = [(p.name, p.arguments) for p in pieces if isinstance(p, Call)]
    return "".join(p for p in pieces if isinstance(p, str)), calls


def joined(pieces: Sequence[str | Call]) -> list[str | Call]:
    """The same with neighbouring texts as one."""
    out: list[str | Call] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        else:
            out.append(piece)
    return out
