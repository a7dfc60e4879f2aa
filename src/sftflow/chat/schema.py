"""The canonical conversation: what every row becomes, whatever its dialect (`dialects`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sftflow.chat.call_arguments import decoded
from sftflow.chat.columns import Columned, Columns
from sftflow.chat.dialects import read_row
from sftflow.chat.plain_text import Document, PlainText
from sftflow.chat.pretokenized import Pretokenized
from sftflow.chat.row_keys import MESSAGE_KEYS
from sftflow.chat.shapes import SAY_WHICH
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import kind_of, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
PART_KINDS = ("text", "python", "python_output")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message. `python` is a calculator call, `python_output` its result."""

    kind: Literal["text", "python", "python_output"]
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `parts` has one text part for plain content; it is empty where the content is null.

    weight: what the loss of its tokens is multiplied by, 0 to 1 (0: it is not taught); None: a reply in a prompt, which
    only `supervise: all` teaches."""

    role: str
    parts: tuple[Part, ...]
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    weight: int | float | None = 1

    @property
    def text(self) -> str:
        """The content as one string, parts joined."""
        return "".join(part.text for part in self.parts)

    @property
    def uses_python(self) -> bool:
        return any(part.kind != "text" for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The message in the OpenAI shape, as `parse_message` reads it: a text, or parts where it calls the calculator.

        >>> text_message("user", "hi").to_json()
        {'role': 'user', 'content': 'hi'}
        """
        content: Any = self.text if self.parts else None
        if self.uses_python:
            content = [{"type": part.kind, "text": part.text} for part in self.parts]
        out: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            out["tool_calls"] = list(self.tool_calls)
        for key in ("tool_call_id", "name", "reasoning_content"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        return out if self.weight in (1, None) else {**out, "weight": self.weight}


def text_message(role: str, text: str) -> Message:
    return Message(role, (Part("text", text),))


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. `source` is FILE:LINE (or task:number); `meta` keeps the row's other keys, `ignored` names what of
    them is not empty, and unknown keys of its messages. A row that is `tokens` already, or a `document` of plain text,
    has no messages.   weight: the row's own, beside those of its messages; above 0, but of a document.

    `to_row` gives it back in the canonical shape, which `parse_row` reads.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    ignored: tuple[str, ...] = ()
    tokens: Pretokenized | None = None
    weight: int | float = 1
    document: Document | None = None

    def before(self, turn: int) -> Conversation:
        """The history in front of message number `turn`."""
        return replace(self, messages=self.messages[:turn])

    @property
    def supervised(self) -> list[int]:
        """The messages that are trained on as replies: those of the assistant, but for weight 0 or None."""
        return [i for i, m in enumerate(self.messages) if m.role == "assistant" and m.weight]

    @property
    def left_out(self) -> list[int]:
        """The messages of weight 0, whoever wrote them: `supervise: all` leaves them out."""
        return [i for i, m in enumerate(self.messages) if m.weight == 0]

    @property
    def fractions(self) -> list[int]:
        """The assistant's messages whose loss counts in part."""
        return [i for i, m in enumerate(self.messages) if type(m.weight) is float and 0 < m.weight < 1]

    def mentions(self, pattern: re.Pattern[str]) -> bool:
        """Whether a content, some reasoning, a tool call or a tool definition holds the pattern."""
        search = pattern.search
        return any(
            search(m.text)
            or any(search(text) for text in (m.reasoning_content, m.name, m.tool_call_id) if text)
            or (m.tool_calls and search(json.dumps([decoded(c) for c in m.tool_calls], ensure_ascii=False)))
            for m in self.messages
        ) or bool(self.tools and search(json.dumps(self.tools, ensure_ascii=False)))

    def to_row(self) -> dict[str, Any]:
        """{"messages": [...]}, with "tools" where there are any; without `meta` and `source`."""
        own = {"weight": self.weight} if self.weight != 1 else {}
        if self.document is not None:
            return {**self.document.to_row(), **own}
        if self.tokens is not None:
            beside = {"mask": self.tokens.mask, "weights": self.tokens.weights}
            return {"input_ids": list(self.tokens.ids), **{k: list(v) for k, v in beside.items() if v}, **own}
        tools = {**({"tools": list(self.tools)} if self.tools else {}), **own}
        prompt = [i for i, m in enumerate(self.messages) if m.weight is None]
        if prompt:  # as it was given: the completion begins with the first reply behind them
            behind = range(prompt[-1] + 1, len(self.messages))
            n = next((i for i in behind if self.messages[i].role == "assistant"), len(self.messages))
            sides = {"prompt": self.messages[:n], "completion": self.messages[n:]}
            return {**{side: [m.to_json() for m in part] for side, part in sides.items()}, **tools}
        return {"messages": [m.to_json() for m in self.messages], **tools}


def _parts(content: Any, place: str) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Part("text", content),)
    if not isinstance(content, list):
        raise SchemaError(place, f"content is {kind_of(content)}", "make it a string or a list of parts")
    parts = []
    for number, part in enumerate(content):
        where = f"{place}.content[{number}]"
        if not isinstance(part, dict):
            raise SchemaError(where, f"a part is {kind_of(part)}", 'write {"type": "text", "text": ...}')
        kind = part.get("type")
        if kind not in PART_KINDS:
            raise SchemaError(where, f"part type {kind!r} is not known", f"use one of {', '.join(PART_KINDS)}")
        part = {key: value for key, value in part.items() if value is not None}
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise SchemaError(where, f"its text is {kind_of(text)}", "make it a string")
        unknown = set(part) - {"type", "text", "value"}
        if unknown:
            raise SchemaError(where, f"unknown key {sorted(unknown)[0]!r}", "keep only type and text")
        parts.append(Part(kind, text))
    return tuple(parts)


def parse_message(raw: Any, place: str) -> Message:
    """Validate one message, whose calls and weight `dialects` has read. Raises SchemaError, naming the place in the
    row."""
    if not isinstance(raw, dict):
        raise SchemaError(place, f"a message is {kind_of(raw)}", "make it an object with role and content")
    if len(raw) == 2 and raw.get("role") in ROLES and isinstance(raw.get("content"), str):
        return text_message(raw["role"], raw["content"])  # most messages: what follows says the same, later
    unknown = sorted(set(raw) - MESSAGE_KEYS)
    if unknown:
        known = ", ".join(sorted(MESSAGE_KEYS))
        raise SchemaError(place, f"unknown key {unknown[0]!r} in a message", f"remove it; known: {known}")
    role = raw.get("role")
    if role not in ROLES:
        fact = "a message without a role" if role is None else f"role {role!r} is not known"
        raise SchemaError(place, fact, f"use one of {', '.join(ROLES)}")
    texts = {key: raw.get(key) for key in ("tool_call_id", "name", "reasoning_content")}
    for key, text in texts.items():
        if not isinstance(text, str | None):
            raise SchemaError(f"{place}.{key}", f"it is {kind_of(text)}", "make it a string")
    calls = raw.get("tool_calls") or []
    for key in ("tool_calls", "reasoning_content", "weight"):
        if (raw.get(key) if key == "weight" else raw.get(key) not in (None, "")) and role != "assistant":
            fact = f"only an assistant message has {key}, and this is a {role} message"
            raise SchemaError(f"{place}.{key}", fact, f"correct its role, or remove {key}")
    if role != "assistant":
        texts["reasoning_content"] = None
    if "content" not in raw and not calls:
        raise SchemaError(place, "no content", "give content, or tool_calls on an assistant message")
    parts = _parts(raw.get("content"), place)
    if not parts and not (role == "assistant" and calls):
        raise SchemaError(f"{place}.content", "content is null", 'write "" for an empty message')
    if role != "assistant" and any(p.kind != "text" for p in parts):
        raise SchemaError(
            f"{place}.content", f"python parts in a {role} message", "move them into an assistant message"
        )
    return Message(role, parts, tuple(calls), weight=raw.get("weight", 1), **texts)


def parse_row(row: Any, place: str, columns: Columns | None = None, *, plain: bool = False) -> Conversation:
    """One row of any accepted dialect -> the canonical conversation.   columns: the row's names of keys by ours.
    plain: the recipe says that it is plain text.

    Raises SchemaError, naming the place in the row.

    >>> parse_row({"prompt": "hi", "completion": "yo"}, "x:1").messages[1].text
    'yo'
    """
    raw = read_row(row, place, columns, plain=plain)
    if raw.document is not None:
        return Conversation((), (), raw.meta, place, raw.ignored, weight=raw.weight, document=raw.document)
    if raw.tokens is not None:
        return Conversation((), (), raw.meta, place, raw.ignored, raw.tokens, raw.weight)
    found = [tuple(parse_message(message, where) for where, message in turns) for turns in raw.conversations]
    if not found[0]:
        raise SchemaError(f"{place}.messages", "no messages", "give at least one")
    weighed = [[replace(m, weight=m.weight or 0) for m in messages] for messages in found]
    if any(messages != weighed[0] for messages in weighed[1:]):
        ends = [[turns[at][0].rpartition(".")[2].partition("[")[0] for turns in raw.conversations] for at in (0, -1)]
        names = max(ends, key=lambda keys: len(set(keys)))
        fact = f"different conversations under {' and '.join(dict.fromkeys(names))}"
        raise SchemaError(place, fact, f"keep one of them, or {SAY_WHICH}")
    return Conversation(found[0], tuple(raw.tools), raw.meta, place, raw.ignored, weight=raw.weight)


def conversation_of(payload: Any, place: str) -> Conversation:
    """A row in any form that a source has it in: a Conversation (as it is), a JSONL line's bytes or parsed JSON, both
    also with the names of their columns, and as plain text."""
    if isinstance(payload, Conversation):
        return payload
    plain = isinstance(payload, PlainText)
    payload, columns = payload.row if plain else payload, None
    if isinstance(payload, Columned):
        payload, columns = payload
    row = parse_line(payload, place) if isinstance(payload, bytes) else payload
    return parse_row(row, place, columns, plain=plain)


def parse_line(line: bytes, place: str) -> Any:
    """One line of a JSONL file -> its row. Raises DataError where it is not JSON, or not UTF-8."""
    return parse_json(line, place)
