"""The dialects that rows are written in -> messages in the OpenAI shape, not yet validated.

{"messages": [...], "tools"?: [...]}                       OpenAI chat, the canonical shape
[{"role": ..., "content": ...}, ...]                       a bare list of messages
{"prompt": text | messages, "completion": text | messages}
{"instruction": ..., "input"?: ..., "output": ...}         Alpaca, with "system" and "history"; also query, response
{"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT

What each key means: `row_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sftflow.chat.row_keys import (
    CALL_ROLES,
    CONVERSATIONS,
    FLAGS,
    MESSAGE_KEYS,
    MESSAGE_REFUSED,
    PREFERRED,
    REFUSED,
    ROLES,
    SAME_AS,
    SYSTEM,
    TOOLS,
    TURN_NAMES,
    absent,
    refuse,
)
from sftflow.chat.tool_calls import calls_in_content, read_calls, read_json, read_tools
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of

Turn = tuple[str, Any]
"""(place, message)"""


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """conversations: what each dialect that the row is whole in makes of it.   meta: the row's other keys.
    ignored: names of keys that nothing was made of, those of messages as `messages[].name`."""

    conversations: list[list[Turn]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_row(row: Any, place: str) -> RawRow:
    """One row of any dialect. Raises SchemaError where it is of none, or a key cannot be honoured."""
    if isinstance(row, list):
        return RawRow(conversations=[_turns(row, f"{place}.messages", set())])
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}", "make it an object with messages")
    if len(row) == 1 and isinstance(row.get("messages"), list):
        return RawRow(conversations=[_turns(row["messages"], f"{place}.messages", set())])
    row = {key: value for key, value in row.items() if value is not None}
    if row.get("messages") and row.get("chosen") == row["messages"]:  # both: for instruction tuning the first is given
        refuse({key: value for key, value in row.items() if key not in ("chosen", "rejected")}, REFUSED, place)
    else:
        refuse(row, REFUSED, place)
    ignored: set[str] = set()
    conversations, used = _conversations(row, place, ignored)
    system = _system(row, place)
    without = _not_taught(row, place)
    for turns in conversations:
        if system is not None:
            _put_in_front(system, turns, place)
        for _, message in turns if without else ():
            if isinstance(message, dict) and message.get("role") == "assistant":
                message["weight"] = 0
    used |= {*SYSTEM, *TOOLS, "weight", *(key for key in PREFERRED if isinstance(row.get(key), bool))}
    meta = {key: value for key, value in row.items() if key not in used}
    ignored |= {key for key, value in meta.items() if not absent(value)}
    return RawRow(conversations=conversations, tools=_tools(row, place), meta=meta, ignored=tuple(sorted(ignored)))


# ---- the dialects


def _conversations(row: dict[str, Any], place: str, ignored: set[str]) -> tuple[list[list[Turn]], set[str]]:
    """The conversation in each dialect that the row is whole in, and the keys of these."""
    whole = [(keys, read) for keys, read in _DIALECTS if all(key in row for key in keys)]
    whole = [(keys, read) for keys, read in whole if all(_usable(key, row[key]) for key in keys)] or whole[:1]
    if not whole:
        names = ", ".join(map(repr, list(row)[:4])) or "none"
        raise SchemaError(place, f"no known dialect (keys: {names})", "give messages, or prompt and completion")
    used: set[str] = set()
    conversations = []
    for keys, read in whole:
        conversations.append(read(row, keys, place, ignored))
        used |= {*keys, *(("input", "history") if read is _asked else ())}
    if "history" not in used and not absent(row.get("history")):
        raise SchemaError(f"{place}.history", f"a history beside {whole[0][0][0]}", "put its turns into the messages")
    return conversations, used


def _usable(key: str, value: Any) -> bool:
    """Whether a dialect's value is not empty, nor a text where only JSON would do."""
    is_words = isinstance(value, str) and key in CONVERSATIONS and not value.lstrip().startswith("[")
    return not absent(value) and not is_words


def _listed(row: dict[str, Any], keys: tuple[str, ...], place: str, ignored: set[str]) -> list[Turn]:
    (key,) = keys
    where = f"{place}.{key}"
    turns = read_json(row[key], where) if isinstance(row[key], str) else row[key]
    if not isinstance(turns, list):
        raise SchemaError(where, f"it is {kind_of(turns)}", "make it a list of messages")
    return _turns(turns, where, ignored)


def _completed(row: dict[str, Any], keys: tuple[str, ...], place: str, ignored: set[str]) -> list[Turn]:
    """A prompt, of which nothing is taught, and its completion."""
    prompt, completion = (
        _side(row[key], role, f"{place}.{key}", ignored) for key, role in zip(keys, _SIDES, strict=True)
    )
    for where, message in prompt:
        if isinstance(message, dict) and message.get("role") == "assistant":
            if message.get("weight"):
                raise SchemaError(f"{where}.weight", "nothing of a prompt is taught", "move it into the completion")
            message["weight"] = 0
    ends = [turns[at][1] for turns, at in ((prompt, -1), (completion, 0)) if turns]
    if len(ends) == 2 and all(isinstance(m, dict) and m.get("role") == "assistant" for m in ends):
        fact = "the prompt ends with a reply, and the completion begins with one"
        raise SchemaError(f"{place}.prompt", fact, "put what begins the reply into the completion")
    return [*prompt, *completion]


_SIDES = ("user", "assistant")


def _side(value: Any, role: str, place: str, ignored: set[str]) -> list[Turn]:
    if isinstance(value, str):
        return [(place, {"role": role, "content": _text(value, place)})]
    if isinstance(value, list):
        return _turns(value, place, ignored)
    raise SchemaError(place, f"it is {kind_of(value)}", "make it a text or a list of messages")


def _asked(row: dict[str, Any], keys: tuple[str, ...], place: str, ignored: set[str]) -> list[Turn]:
    """Alpaca, and its like: earlier exchanges, then what is asked and replied."""
    history = [] if absent(row.get("history")) else row["history"]
    pairs: list[tuple[str, Any]] = []
    if not isinstance(history, list):
        raise SchemaError(f"{place}.history", f"it is {kind_of(history)}", "make it a list of [asked, replied] pairs")
    for number, pair in enumerate(history):
        where = f"{place}.history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SchemaError(where, "not a pair of texts", "make it [asked, replied]")
        pairs += [(where, _text(side, where)) for side in pair]
    asks = [_text(row[key], f"{place}.{key}") for key in (keys[0], "input") if not absent(row.get(key))]
    pairs.append((f"{place}.{keys[0]}", "\n\n".join(asks)))
    pairs.append((f"{place}.{keys[1]}", _text(row[keys[1]], f"{place}.{keys[1]}")))
    return [(where, {"role": _SIDES[i % 2], "content": text}) for i, (where, text) in enumerate(pairs)]


_DIALECTS: list[tuple[tuple[str, ...], Any]] = [
    *(((key,), _listed) for key in CONVERSATIONS),
    (("prompt", "completion"), _completed),
    (("instruction", "output"), _asked),
    (("query", "response"), _asked),
]


# ---- what goes with any dialect


def _system(row: dict[str, Any], place: str) -> str | None:
    """The system message that the row has as a key of its own."""
    given = {key: _text(row[key], f"{place}.{key}") for key in SYSTEM if not absent(row.get(key))}
    if len(set(given.values())) > 1:
        raise SchemaError(place, f"{' and '.join(given)} differ", "keep one of them")
    return next(iter(given.values()), None)


def _put_in_front(system: str, turns: list[Turn], place: str) -> None:
    first = turns[0][1] if turns else None
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        turns.insert(0, (f"{place}.system", {"role": "system", "content": system}))
        return
    content = first.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text", p.get("value"))) if isinstance(p, dict) else "" for p in content)
    if content != system:
        fact = "the row's own system message is another than the conversation's"
        raise SchemaError(f"{place}.system", fact, "keep one of them")


def _not_taught(row: dict[str, Any], place: str) -> bool:
    """Whether the row's own weight is 0. Raises SchemaError where it says that its reply is not wanted."""
    for key in PREFERRED:
        if row.get(key) is False or (key == "kto_tag" and row.get(key) == 0):
            fact = f"{key} is false: a reply that is not wanted (preference data)"
            raise SchemaError(f"{place}.{key}", fact, "remove the row")
    return _flag({"weight": row["weight"]}, place) == 0 if "weight" in row else False


def _tools(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    given = {key: read_tools(row[key], f"{place}.{key}") for key in TOOLS if not absent(row.get(key))}
    if "functions" in given:
        given["functions"] = [{"type": "function", "function": function} for function in given["functions"]]
    if len(given) == 2 and given["tools"] != given["functions"]:
        raise SchemaError(place, "tools and functions differ", "keep one of them")
    return next(iter(given.values()), [])


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SchemaError(place, f"it is {kind_of(value)}", "make it a string")
    check_plain(value, place)
    return value


# ---- messages


def _turns(turns: list[Any], place: str, ignored: set[str]) -> list[Turn]:
    """Messages of any spelling in the canonical one. Calls that follow each other are one message."""
    out: list[Turn] = []
    called = False
    for number, raw in enumerate(turns):
        where = f"{place}[{number}]"
        message = _message(raw, where, ignored)
        calls = isinstance(raw, dict) and raw.get("from", raw.get("role")) in CALL_ROLES
        if called and calls and message.get("weight") == out[-1][1].get("weight") and message["content"] is None:
            out[-1][1]["tool_calls"] += message["tool_calls"]
        else:
            out.append((where, message))
        called = calls
    return out


def _message(raw: Any, place: str, ignored: set[str]) -> Any:
    """One message with the names of OpenAI's; what is not one is left for `parse_message` to name."""
    if not isinstance(raw, dict):
        return raw
    check_plain(raw, place)
    if len(raw) == 2 and raw.get("role") in _PLAIN and "content" in raw:
        return dict(raw)  # as most messages are
    sharegpt = "from" in raw
    message = {key: value for key, value in raw.items() if key == "content" or value not in (None, [], {})}
    refuse(message, MESSAGE_REFUSED, place)
    for alias, name in SAME_AS.items():
        if alias in message:
            value = message.pop(alias)
            if message.get(name, value) != value:
                raise SchemaError(place, f"{alias} and {name} differ", "keep one of them")
            message[name] = value
    said = message.get("role")
    role = TURN_NAMES.get(str(said)) if sharegpt else ROLES.get(str(said), said)
    if said in CALL_ROLES:
        role = "assistant"
        message["content"], message["tool_calls"] = calls_in_content(message.get("content"), f"{place}.content")
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
    if flags and _flag(flags, place) and role != "assistant":
        flag = next(iter(flags))
        raise SchemaError(f"{place}.{flag}", f"only an assistant message has {flag}, this is {said}", "remove it")
    if flags and role == "assistant":
        message["weight"] = _flag(flags, place)
    if sharegpt:
        unknown = message.keys() - MESSAGE_KEYS
        ignored |= {f"{place.rpartition('.')[2].partition('[')[0]}[].{key}" for key in unknown}
        message = {key: value for key, value in message.items() if key in MESSAGE_KEYS}
    return message


_PLAIN = ("user", "assistant", "system")


def _flag(flags: dict[str, Any], place: str) -> int:
    """Whether a message is taught, 0 or 1, by flags that say so."""
    for key, value in flags.items():
        if value not in (0, 1):
            raise SchemaError(f"{place}.{key}", f"{key} is {value!r}", "use 0 or 1")
    if len(set(flags.values())) > 1:
        raise SchemaError(place, f"{' and '.join(flags)} contradict each other", "keep one of them")
    return int(next(iter(flags.values())))
