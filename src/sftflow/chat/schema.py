"""The canonical conversation, and the dialects that are normalised into it.

{"messages": [...], "tools"?: [...]}                       OpenAI chat, the canonical shape
[{"role": ..., "content": ...}, ...]                       a bare list of messages
{"prompt": text | messages, "completion": text | messages}
{"instruction": ..., "input"?: ..., "output": ...}         Alpaca
{"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sftflow.chat.call_arguments import decoded
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
PART_KINDS = ("text", "python", "python_output")
MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "weight"}
SHAREGPT_NAMES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bot"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation", "function_response"),
}
SHAREGPT_ROLES = {name: role for role, names in SHAREGPT_NAMES.items() for name in names}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message. `python` is a calculator call, `python_output` its result."""

    kind: Literal["text", "python", "python_output"]
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `parts` has one text part for plain content; it is empty where the content is null."""

    role: str
    parts: tuple[Part, ...]
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    weight: int = 1

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
        return out if self.weight else {**out, "weight": 0}


def text_message(role: str, text: str) -> Message:
    return Message(role, (Part("text", text),))


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. `source` is FILE:LINE (or task:number); `meta` keeps the row's other keys.

    `to_row` gives it back in the canonical shape, which `parse_row` reads.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def before(self, turn: int) -> Conversation:
        """The history in front of message number `turn`."""
        return replace(self, messages=self.messages[:turn])

    @property
    def supervised(self) -> list[int]:
        """The messages that are trained on: those of the assistant, but for weight 0."""
        return [i for i, m in enumerate(self.messages) if m.role == "assistant" and m.weight]

    def mentions(self, pattern: re.Pattern[str]) -> bool:
        """Whether a content, some reasoning, a tool call or a tool definition holds the pattern."""
        search = pattern.search
        return any(
            search(m.text)
            or search(m.reasoning_content or "")
            or (m.tool_calls and search(json.dumps([decoded(c) for c in m.tool_calls], ensure_ascii=False)))
            for m in self.messages
        ) or bool(self.tools and search(json.dumps(self.tools, ensure_ascii=False)))

    def to_row(self) -> dict[str, Any]:
        """{"messages": [...]}, with "tools" where there are any; without `meta` and `source`."""
        tools = {"tools": list(self.tools)} if self.tools else {}
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
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise SchemaError(where, f"its text is {kind_of(text)}", "make it a string")
        unknown = set(part) - {"type", "text", "value"}
        if unknown:
            raise SchemaError(where, f"unknown key {sorted(unknown)[0]!r}", "keep only type and text")
        parts.append(Part(kind, text))
    return tuple(parts)


def parse_message(raw: Any, place: str) -> Message:
    """Validate one message. Raises SchemaError that names the place inside the row."""
    if not isinstance(raw, dict):
        raise SchemaError(place, f"a message is {kind_of(raw)}", "make it an object with role and content")
    unknown = sorted(set(raw) - MESSAGE_KEYS)
    if unknown:
        known = ", ".join(sorted(MESSAGE_KEYS))
        raise SchemaError(place, f"unknown key {unknown[0]!r} in a message", f"known: {known}")
    role = raw.get("role")
    if role not in ROLES:
        fact = "a message without a role" if role is None else f"role {role!r} is not known"
        raise SchemaError(place, fact, f"use one of {', '.join(ROLES)}")
    texts = {key: raw.get(key) for key in ("tool_call_id", "name", "reasoning_content")}
    for key, text in texts.items():
        if not isinstance(text, str | None):
            raise SchemaError(f"{place}.{key}", f"it is {kind_of(text)}", "make it a string")
    calls = raw.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise SchemaError(f"{place}.tool_calls", "not a list of objects", "see the OpenAI chat shape")
    for number, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SchemaError(f"{place}.tool_calls[{number}]", "no function name", "give function.name and arguments")
        if not isinstance(function.get("arguments", {}), (dict, str)):
            raise SchemaError(f"{place}.tool_calls[{number}]", "arguments are neither object nor string", "mend them")
    for key in ("tool_calls", "reasoning_content", "weight"):
        if raw.get(key) is not None and role != "assistant":
            raise SchemaError(f"{place}.{key}", f"only an assistant message has {key}, this is {role}", "remove it")
    weight = raw.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise SchemaError(f"{place}.weight", f"weight is {weight!r}", "use 0 or 1")
    if "content" not in raw and not calls:
        raise SchemaError(place, "no content", "give content, or tool_calls on an assistant message")
    parts = _parts(raw.get("content"), place)
    if not parts and not (role == "assistant" and calls):
        raise SchemaError(f"{place}.content", "content is null", 'write "" for an empty message')
    if role != "assistant" and any(p.kind != "text" for p in parts):
        raise SchemaError(f"{place}.content", f"python parts in a {role} message", "only the assistant calls the tool")
    return Message(role, parts, tuple(calls), weight=weight, **texts)


def _side(value: Any, role: str, place: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise SchemaError(place, f"it is {kind_of(value)}", "make it a text or a list of messages")


def _sharegpt(raw: Any, place: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not isinstance(raw.get("value"), str):
        raise SchemaError(place, "a ShareGPT turn without a text `value`", 'write {"from": "human", "value": ...}')
    role = SHAREGPT_ROLES.get(str(raw.get("from")))
    if raw.get("from") == "function_call":
        try:
            call = json.loads(raw["value"])
        except ValueError:
            raise SchemaError(place, "a function_call that is not JSON", "give name and arguments") from None
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    if role is None:
        raise SchemaError(place, f"from {raw.get('from')!r} is not known", f"use one of {', '.join(SHAREGPT_ROLES)}")
    out: dict[str, Any] = {"role": role, "content": raw["value"]}
    if role == "assistant" and "weight" in raw:
        out["weight"] = raw["weight"]
    return out


def _dialect(row: Any, place: str) -> tuple[Any, tuple[str, ...]]:
    """(the row's messages in the canonical shape, not yet validated; the keys that were read)."""
    if isinstance(row, list):
        return row, ()
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}", "make it an object with messages")
    if "messages" in row:
        return row["messages"], ("messages", "tools")
    if "prompt" in row and "completion" in row:
        prompt = _side(row["prompt"], "user", f"{place}.prompt")
        completion = _side(row["completion"], "assistant", f"{place}.completion")
        return [*prompt, *completion], ("prompt", "completion", "tools")
    if "instruction" in row and "output" in row:
        for key in ("instruction", "output"):
            if not isinstance(row[key], str):
                raise SchemaError(f"{place}.{key}", f"it is {kind_of(row[key])}", "make it a string")
        asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        exchange = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        return exchange, ("instruction", "input", "output")
    if "conversations" in row:
        turns = row["conversations"]
        if not isinstance(turns, list):
            raise SchemaError(f"{place}.conversations", f"it is {kind_of(turns)}", "make it a list of turns")
        raw = [_sharegpt(turn, f"{place}.conversations[{i}]") for i, turn in enumerate(turns)]
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [*system, *raw], ("conversations", "tools", "system")
    keys = ", ".join(map(repr, list(row)[:4])) or "none"
    raise SchemaError(place, f"no known dialect (keys: {keys})", "give messages, or prompt and completion")


def parse_row(row: Any, place: str) -> Conversation:
    """One row of any accepted dialect -> the canonical conversation.

    >>> parse_row({"prompt": "hi", "completion": "yo"}, "x:1").messages[1].text
    'yo'
    """
    raw, used = _dialect(row, place)
    fields = row if isinstance(row, dict) else {}
    meta = {key: value for key, value in fields.items() if key not in used}
    tools: Any = (fields.get("tools") or []) if "tools" in used else []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise SchemaError(f"{place}.tools", "a string that is not JSON", "give a list of tools") from None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise SchemaError(f"{place}.tools", "not a list of objects", "see the OpenAI tool shape")
    if not isinstance(raw, list) or not raw:
        raise SchemaError(f"{place}.messages", "no messages", "give at least one")
    check_plain(raw, f"{place}.messages")
    check_plain(tools, f"{place}.tools")
    messages = tuple(parse_message(m, f"{place}.messages[{i}]") for i, m in enumerate(raw))
    return Conversation(messages, tuple(tools), meta, place)


def conversation_of(payload: Any, place: str) -> Conversation:
    """A row in any form that a source has it in: a Conversation (as it is), a JSONL line's bytes, or parsed JSON."""
    if isinstance(payload, Conversation):
        return payload
    return parse_row(parse_line(payload, place) if isinstance(payload, bytes) else payload, place)


def parse_line(line: bytes, place: str) -> Any:
    """One line of a JSONL file -> its row. Raises DataError where it is not JSON, or not UTF-8."""
    return parse_json(line, place)
