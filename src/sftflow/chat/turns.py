"""Messages of any spelling -> those of OpenAI's, not yet validated."""

from __future__ import annotations

from typing import Any

from sftflow.chat.row_keys import (
    CALL_ROLES,
    FLAGS,
    MESSAGE_IGNORED,
    MESSAGE_KEYS,
    MESSAGE_READ,
    MESSAGE_REFUSED,
    NOT_TAUGHT,
    PARTS,
    SAME_AS,
    SPEAKERS,
    TEXTS,
    TURN_NAMES,
    WEIGHTS,
    absent,
    refuse,
)
from sftflow.chat.tool_calls import calls_in_content, read_calls
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of

Turn = tuple[str, Any]
"""(place, message)"""


_PLAIN = ("user", "assistant", "system")
_ORDER = ("system", "user", "assistant")
_ITEMS = {"function_call": ("name", "arguments"), "function_call_output": ("output",)}
_NAMES = {*TURN_NAMES, *CALL_ROLES}


def read_turns(turns: list[Any], place: str, ignored: set[str]) -> list[Turn]:
    """Messages of any spelling in the canonical one. Calls that follow each other are one message, as is a
    `tool_call` with what the assistant says in front of it."""
    out: list[Turn] = []
    joins = False
    for number, raw in enumerate(turns):
        where = f"{place}[{number}]"
        name = raw.get("from", raw.get("role")) if isinstance(raw, dict) else None
        if name is None and isinstance(raw, dict) and raw.get("type") in _ITEMS:
            raw = _item(raw, where)
            name = raw["role"]
        elif name is None and (spoken := _spoken(raw, where)):
            out += [(at, _message(message, at, ignored)) for at, message in spoken]
            joins = False
            continue
        if type(name) is str and name not in _NAMES and name.lower() in _NAMES:
            name = name.lower()
            raw = {**raw, "from" if "from" in raw else "role": name}
        message = _message(raw, where, ignored)
        calls = name in CALL_ROLES
        before: Any = out[-1][1] if calls and out and (joins or name == "tool_call") else None
        said = isinstance(before, dict) and before.get("role") == "assistant"
        if said and not message["content"] and before.get("weight", 1) == message.get("weight", 1):
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        else:
            out.append((where, message))
        joins = calls
    return out


def _item(raw: dict[str, Any], place: str) -> dict[str, Any]:
    """A call, or what came of it, as an item of OpenAI's Responses has it -> the message."""
    known = {"type", "call_id", "id", "status", *_ITEMS[raw["type"]]}
    if unknown := sorted(key for key, value in raw.items() if key not in known and not absent(value)):
        raise SchemaError(place, f"unknown key {unknown[0]!r} in a {raw['type']}", f"known: {', '.join(sorted(known))}")
    if raw["type"] == "function_call":
        call = {"id": raw.get("call_id"), "name": raw.get("name"), "arguments": raw.get("arguments")}
        return {"role": "tool_call", "content": call}
    return {"role": "tool", "content": raw.get("output"), "tool_call_id": raw.get("call_id")}


def _spoken(turn: Any, place: str) -> list[Turn]:
    """A turn that is {"user": ..., "assistant": ...}, or the half of it, as messages; any other as none."""
    there = {key for key, value in turn.items() if not absent(value)} if isinstance(turn, dict) else set()
    said = {key: SPEAKERS.get(str(key).lower()) for key in sorted(there)}
    if None in said.values():
        return []
    if len(set(said.values())) < len(said):
        raise SchemaError(place, f"{', '.join(said)} in one turn, of which two are the same role", "keep one of them")
    return [
        (f"{place}.{key}", {"role": said[key], "content": turn[key]})
        for key in sorted(said, key=lambda key: _ORDER.index(str(said[key])))
    ]


def _message(raw: Any, place: str, ignored: set[str]) -> Any:
    """One message with the names of OpenAI's; what is not one is left for `parse_message` to name."""
    if not isinstance(raw, dict):
        return raw
    if len(raw) == 2 and raw.get("role") in _PLAIN and type(raw.get("content")) is str and raw["content"].isascii():
        return dict(raw)  # as most messages are
    sharegpt = "from" in raw
    read = {key: value if key in MESSAGE_READ else None for key, value in raw.items()} if len(raw) > 2 else raw
    check_plain(read, place)
    if len(raw) == 2 and raw.get("role") in _PLAIN and isinstance(raw.get("content"), str):
        return dict(raw)
    message = {k: v for k, v in raw.items() if k == "content" or not (v is None if k in TEXTS else absent(v))}
    if message.get("type") == "message":  # an item of OpenAI's Responses
        del message["type"]
    if "text" in message and "content" not in raw and "value" not in raw:
        message["content"] = message.pop("text")
    refuse(message, MESSAGE_REFUSED, place)
    for alias, name in SAME_AS.items():
        if alias in message:
            value, other = message.pop(alias), message.get(name)
            if absent(value) and not absent(other):
                value = other
            same = absent(other) or value == other or (alias == "from" and _role(value) == _role(other))
            if not same:
                raise SchemaError(place, f"{alias} and {name} differ", "keep one of them")
            message[name] = value
    if isinstance(message.get("content"), list):
        _take_parts(message, place)
    said = message.get("role")
    role = TURN_NAMES.get(str(said), None if sharegpt else said)
    if said in CALL_ROLES:
        role = "assistant"
        where = f"{place}.{'value' if sharegpt else 'content'}"
        message["content"], message["tool_calls"] = calls_in_content(message.get("content"), where)
    elif role is None and sharegpt:
        raise SchemaError(place, f"from {said!r} is not known", f"use one of {', '.join([*TURN_NAMES, *CALL_ROLES])}")
    elif "tool_calls" in message:
        message["tool_calls"] = read_calls(message["tool_calls"], f"{place}.tool_calls")
    if "function_call" in message:
        call = read_calls([message.pop("function_call")], f"{place}.function_call")
        if "tool_calls" in message:
            raise SchemaError(place, "function_call and tool_calls in one message", "keep one of them")
        message["tool_calls"] = call
    message["role"] = role
    flags = {key: message.pop(key) for key in FLAGS if key in message}
    if sharegpt and isinstance(message.get("label"), bool):  # other labels are classes
        flags["label"] = message.pop("label")
    taught = bool(flags) and weight_of(flags, place)
    flag = next((key for key in flags if key not in NOT_TAUGHT), None)  # tables have `masked: false` in every message
    if taught and flag and role != "assistant":
        fact = f"only an assistant message has {flag}, and this is a {said} message"
        raise SchemaError(f"{place}.{flag}", fact, f"remove {flag}")
    if flags and ((flag and role == "assistant") or not taught):
        message["weight"] = taught
    unknown = message.keys() - MESSAGE_KEYS if sharegpt else message.keys() & MESSAGE_IGNORED
    if unknown:
        ignored |= {f"{place.rpartition('.')[2].partition('[')[0]}[].{key}" for key in unknown}
        message = {key: value for key, value in message.items() if key not in unknown}
    return message


def _role(name: Any) -> str:
    return TURN_NAMES.get(str(name).lower(), str(name))


def _take_parts(message: dict[str, Any], place: str) -> None:
    """Parts of type `reasoning` and `tool_call` become the message's reasoning, in front of the text, and its calls,
    behind it."""
    parts = message["content"] = [_part(part) for part in message["content"]]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    start = next((i for i, kind in enumerate(kinds) if kind != "reasoning"), len(kinds))
    end = next((i for i in range(len(kinds), start, -1) if kinds[i - 1] != "tool_call"), start)
    if "reasoning" not in kinds and "tool_call" not in kinds:
        return
    if "reasoning" in kinds[start:] or "tool_call" in kinds[:end] or "reasoning_content" in message:
        fact = "reasoning or calls in several places"
        raise SchemaError(f"{place}.content", fact, "put reasoning first, then text, then calls")
    thoughts = [part.get("value", part.get("text")) for part in parts[:start]]
    if not all(isinstance(thought, str) for thought in thoughts):
        raise SchemaError(f"{place}.content[0]", "reasoning that is not a text", "make it a string")
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    for i in range(end, len(parts)):
        _, calls = calls_in_content(parts[i].get("value", parts[i].get("text")), f"{place}.content[{i}]")
        message["tool_calls"] = [*message.get("tool_calls", []), *calls]
    message["content"] = parts[start:end] or None


def _part(part: Any) -> Any:
    """A part under the names of OpenAI's Responses, or Anthropic's, by ours; without what is not there."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        return part
    found = {"text" if key == kind else key: value for key, value in part.items() if not absent(value) or key == "text"}
    return {**found, "type": PARTS[kind]}


def weight_of(flags: dict[str, Any], place: str) -> int | float:
    """How much the loss of a message, or of a row, counts by the flags that say so: 0, 1, or a number between."""
    said: dict[str, int | float] = {}
    for key, value in flags.items():
        check_plain(value, f"{place}.{key}")
        if key in WEIGHTS and type(value) is float and 0 < value < 1:
            said[key] = value
        elif value in (0, 1):
            said[key] = int(value) ^ (key in NOT_TAUGHT)
        else:
            fact = f"{key} is {repr(value) if isinstance(value, int | float | str) else kind_of(value)}"
            raise SchemaError(f"{place}.{key}", fact, "use a number from 0 to 1" if key in WEIGHTS else "use 0 or 1")
    amounts = {value for key, value in said.items() if key in WEIGHTS}
    if len(amounts) > 1 or len({bool(value) for value in said.values()}) > 1:
        raise SchemaError(place, f"{' and '.join(flags)} contradict each other", "keep one of them")
    return amounts.pop() if amounts else said.popitem()[1]
