"""How a chat format writes tool calls, learnt from its own template.

A call whose name, keys and values are marks is rendered; what stands around the marks is the format's:

    <tool_call>\\n{"name": "zqfa", "arguments": {"zqka": "zqva"}}\\n</tool_call>      JSON that holds name and arguments
    [TOOL_CALLS]zqfa[ARGS]{"zqka": "zqva"}                                         a name, then JSON arguments
    <tool_call>zqfa\\n<arg_key>zqka</arg_key>\\n<arg_value>zqva</arg_value>...       keys and values between tags

Two calls, two arguments and none tell what stands between and after them. A learnt format is believed only where it
reads back what the template wrote. Special tokens are left out on both sides: a reply's text does not have them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, Message, text_message
from sftflow.chat.tool_parser import IDENTITIES, CallFormat, JsonEntry, NamedEntry, Path, TaggedEntry, read_calls
from sftflow.foundation.errors import SftflowError
from sftflow.foundation.sequences import common_prefix

NAMES, KEYS, VALUES, TEXT = ("zqfa", "zqfb"), ("zqka", "zqkb"), ("zqva", "zqvb"), "zqtext"
ONE, TWO = ({key: value} for key, value in zip(KEYS, VALUES, strict=True))


def learn_calls(renderer: Renderer) -> CallFormat | None:
    """The format's way to write calls; None where it has none that can be read back."""
    views = _Views(renderer)
    single, double = views.of([ONE]), views.of([ONE, TWO])
    if single is None:
        return None
    for candidate in _candidates(views, single, double):
        if any(i in word for word in candidate.open.split()[:1] for i in IDENTITIES):
            continue  # it begins with what is another every time, so that it could not be found
        probes: list[list[dict[str, Any]]] = [[ONE], [{}], [{"a": 'x "y" é', "b": 3, "c": {"d": [1, None, "é"]}}]]
        probes += [[ONE, {}], [{}, ONE]] if candidate.between is not None else []
        tools = [_tool(name, {"a": "string", "b": "integer", "c": "object"}) for name in NAMES]
        texts = [views.of(probe) for probe in probes]
        wanted = [("", [(NAMES[i], arguments) for i, arguments in enumerate(probe)]) for probe in probes]
        if [text and read_calls(candidate, tools, text) for text in texts] == wanted:
            return candidate
    return None


@dataclass(frozen=True)
class CallText:
    """How the template writes calls, control tokens included: open, call, (between, call)*, close; a call is head, its
    name, middle, a JSON object of arguments, tail."""

    open: str
    head: str
    middle: str
    tail: str
    between: str | None
    close: str


def written_calls(renderer: Renderer, learnt: CallFormat) -> CallText | None:
    """What a reply must be so that `learnt` reads calls in it; None where these are not a name and then JSON."""
    views = _Views(renderer, control=True)
    single, double = views.of([ONE]), views.of([ONE, TWO])
    if single is None:
        return None
    for found in _candidates(views, single, double):
        call = single[len(found.open) : len(single) - len(found.close)]
        name, arguments = call.find(NAMES[0]), _object_at(call, ONE)
        if _without_control(renderer, found) == learnt and arguments and 0 <= name < arguments[0]:
            middle = call[name + len(NAMES[0]) : arguments[0]]
            return CallText(found.open, call[:name], middle, call[arguments[1] :], found.between, found.close)
    return None


def _without_control(renderer: Renderer, found: CallFormat) -> CallFormat:
    def plain(text: str) -> str:
        return renderer.special_re.sub("", text)

    entry = found.entry
    entry = NamedEntry(plain(entry.middle)) if isinstance(entry, NamedEntry) else entry
    between = None if found.between is None else plain(found.between)
    return CallFormat(plain(found.open), entry, between, plain(found.close))


def _tool(name: str, types: dict[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


class _Views:
    """What the template writes for calls, without the turn's header and end, and but for `control` without special
    tokens."""

    def __init__(self, renderer: Renderer, *, control: bool = False) -> None:
        self._renderer, self._control = renderer, control
        self._tools = tuple(_tool(name, {key: "string" for key in KEYS}) for name in NAMES)
        self._plain = self._text(text_message("assistant", TEXT))
        self._prompt = self._text()

    def _text(self, *reply: Message) -> str | None:
        conversation = Conversation((text_message("user", "u"), *reply), self._tools)
        try:
            return self._renderer.text(conversation, add_generation_prompt=not reply)
        except SftflowError:
            return None

    def of(self, calls: list[dict[str, Any]]) -> str | None:
        """The text of a reply that makes these calls, to NAMES in order; None where it cannot be made out."""
        made = tuple(
            {"id": IDENTITIES[i], "type": "function", "function": {"name": NAMES[i], "arguments": arguments}}
            for i, arguments in enumerate(calls)
        )
        text = self._text(Message("assistant", (), tool_calls=made))
        if text is None or self._plain is None or TEXT not in self._plain:
            return None
        head, _, tail = self._plain.rpartition(TEXT)
        # A reply without calls begins alike (`<think>` ...) and ends alike.
        start = common_prefix(head, text)
        if self._prompt is not None and text.startswith(self._prompt):
            start = max(start, len(self._prompt))
        elif start < len(head):
            return None
        end = len(text) - common_prefix(tail[::-1], text[start:][::-1])
        for token in self._renderer.special_re.finditer(text):  # neither may cut one in two: `<|say|>`, `<|call|>`
            start = token.start() if token.start() < start < token.end() else start
            end = token.end() if token.start() < end < token.end() else end
        return text[start:end] if self._control else self._renderer.special_re.sub("", text[start:end])


def _candidates(views: _Views, single: str, double: str | None) -> Iterator[CallFormat]:
    for entry, start, end in _json_entries(single):
        yield CallFormat(single[:start], entry, _between(double, entry), single[end:])
    name = single.find(NAMES[0])
    arguments = _object_at(single, {KEYS[0]: VALUES[0]})
    if name >= 0 and arguments and name < arguments[0]:
        named = NamedEntry(single[name + len(NAMES[0]) : arguments[0]])
        yield CallFormat(single[:name], named, _between(double, named), single[arguments[1] :])
    two, none = views.of([dict(zip(KEYS, VALUES, strict=True))]), views.of([{}])
    parts = _split(single, [NAMES[0], KEYS[0], VALUES[0]])
    more = _split(two, [NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1]])
    bare = _split(none, [NAMES[0]])
    if parts and more and bare and parts[:3] == more[:3] and parts[3] == more[5]:
        last, between = parts[3], None
        pieces = _split(double, [NAMES[0], KEYS[0], VALUES[0], NAMES[1], KEYS[1], VALUES[1]])
        if pieces:  # behind the last argument of one call: the end of the call, and then the end of all calls
            last = parts[3][: common_prefix(parts[3], pieces[3])]
            between = pieces[3][len(last) :]
        close = parts[3][len(last) :]
        tagged = TaggedEntry(parts[1], parts[2], more[3], last, bare[1].removesuffix(close))
        yield CallFormat(parts[0], tagged, between, close)


def _objects(text: str) -> list[tuple[Any, int, int]]:
    """Every JSON object in a text, also inside others, as (value, start, end)."""
    out = []
    for brace in re.finditer(r"\{", text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, brace.start())
            out.append((value, brace.start(), end))
    return out


def _json_entries(single: str) -> Iterator[tuple[JsonEntry, int, int]]:
    """JSON objects that hold name and arguments, the smallest first, with their span."""
    for value, start, end in reversed(_objects(single)):
        name, arguments = _path(value, NAMES[0]), _path(value, {KEYS[0]: VALUES[0]})
        if start <= single.find(KEYS[0]) and name and arguments:
            yield JsonEntry(name, arguments), start, end


def _path(value: Any, wanted: Any) -> Path | None:
    """Where in a JSON value another is, as itself or as a text that holds it."""
    if value == wanted or (isinstance(wanted, dict) and isinstance(value, str) and _loads(value) == wanted):
        return ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        rest = _path(inner, wanted)
        if rest is not None:
            return (key, *rest)
    return None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _object_at(text: str, wanted: dict[str, str]) -> tuple[int, int] | None:
    """The span of a JSON object in a text."""
    return next(((start, end) for value, start, end in _objects(text) if value == wanted), None)


def _between(double: str | None, entry: JsonEntry | NamedEntry) -> str | None:
    """What stands between two calls."""
    if double is None or NAMES[1] not in double:
        return None
    if isinstance(entry, NamedEntry):
        first = _object_at(double, {KEYS[0]: VALUES[0]})
        second = double.find(NAMES[1])
        return double[first[1] : second] if first and first[1] <= second else None
    spans = []
    for key, value, name in zip(KEYS, VALUES, NAMES, strict=True):
        spans += [
            (start, end)
            for found, start, end in reversed(_objects(double))
            if start <= double.find(key)
            and _path(found, name) == entry.name
            and _path(found, {key: value}) == entry.arguments
        ][:1]
    return double[spans[0][1] : spans[1][0]] if len(spans) == 2 and spans[0][1] <= spans[1][0] else None


def _split(text: str | None, marks: list[str]) -> list[str] | None:
    """The pieces of a text around marks that stand in it in this order, once each."""
    if text is None:
        return None
    pieces, at = [], 0
    for mark in marks:
        found = text.find(mark, at)
        if found < 0 or text.count(mark) != 1:
            return None
        pieces.append(text[at:found])
        at = found + len(mark)
    return [*pieces, text[at:]]
