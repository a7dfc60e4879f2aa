"""The dialects that rows are written in -> messages in the OpenAI shape, not yet validated.

{"messages": [...], "tools"?: [...]}                       OpenAI chat, the canonical shape
[{"role": ..., "content": ...}, ...]                       a bare list of messages
{"prompt": text | messages, "completion": text | messages}
{"instruction": ..., "input"?: ..., "output": ...}         Alpaca, with "system" and "history"; also query, response
{"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT
{"input_ids": [...], "mask" or "labels": [...]}            tokens already: `pretokenized`

What each key means: `row_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sftflow.chat.pretokenized import Pretokenized, read_pretokenized
from sftflow.chat.row_keys import (
    CONVERSATIONS,
    IDS,
    LENGTHS,
    PREFERRED,
    REFUSED,
    ROW_FLAGS,
    SYSTEM,
    TOKEN_KEYS,
    TOOLS,
    absent,
    refuse,
)
from sftflow.chat.tool_calls import read_json, read_tools
from sftflow.chat.turns import Turn, flag_of, read_turns
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """conversations: what each dialect that the row is whole in makes of it.   tokens: the row, where it is such.
    meta: the row's other keys.   ignored: names of keys that nothing was made of, those of messages as
    `messages[].name`."""

    conversations: list[list[Turn]]
    tokens: Pretokenized | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_row(row: Any, place: str) -> RawRow:
    """One row of any dialect. Raises SchemaError where it is of none, or a key cannot be honoured."""
    ignored: set[str] = set()
    bare = row["messages"] if isinstance(row, dict) and len(row) == 1 and "messages" in row else row
    if isinstance(bare, list):
        conversations = [read_turns(bare, f"{place}.messages", ignored)]
        return RawRow(conversations=conversations, ignored=tuple(sorted(ignored)))
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}", "make it an object with messages")
    row = {key: value for key, value in row.items() if value is not None}
    claimed = any(not absent(row.get(key)) for keys, _ in _DIALECTS for key in keys)
    if not absent(row.get(IDS)) or (row.get(IDS) == [] and not claimed):
        return _of_tokens(row, place)
    if isinstance(row.get("ids"), list) and not claimed:
        raise SchemaError(f"{place}.ids", "a list under a name that nobody reads", f"call it {IDS}")
    if row.get("messages") and row.get("chosen") == row["messages"]:  # its rows for instruction tuning keep both
        refuse({key: value for key, value in row.items() if key not in ("chosen", "rejected")}, REFUSED, place)
    else:
        refuse(row, REFUSED, place)
    conversations, used = _conversations(row, place, ignored)
    system = _system(row, place)
    without = _not_taught(row, place)
    for turns in conversations:
        if system is not None:
            _put_in_front(system, turns, place)
        for _, message in turns if without else ():
            if isinstance(message, dict):
                message["weight"] = 0
    used |= {*SYSTEM, *TOOLS, *ROW_FLAGS, *(key for key in PREFERRED if _wanted(row, key) is not None)}
    meta = {key: value for key, value in row.items() if key not in used}
    ignored |= {key for key, value in meta.items() if not absent(value)}
    return RawRow(conversations=conversations, tools=_tools(row, place), meta=meta, ignored=tuple(sorted(ignored)))


def _of_tokens(row: dict[str, Any], place: str) -> RawRow:
    refuse({key: value for key, value in row.items() if key not in TOKEN_KEYS}, REFUSED, place)
    tokens = read_pretokenized(row, place)
    if _not_taught(row, place):
        tokens = replace(tokens, mask=(0,) * len(tokens.ids))
    meta = {key: value for key, value in row.items() if key not in (IDS, LENGTHS, *TOKEN_KEYS, *ROW_FLAGS)}
    ignored = sorted(key for key, value in meta.items() if not absent(value))
    return RawRow(conversations=[[]], tokens=tokens, meta=meta, ignored=tuple(ignored))


# ---- the dialects


def _conversations(row: dict[str, Any], place: str, ignored: set[str]) -> tuple[list[list[Turn]], set[str]]:
    """The conversation in each dialect that the row is whole in, and the keys of these."""
    whole = [(keys, read) for keys, read in _DIALECTS if all(key in row for key in keys)]
    whole = [(keys, read) for keys, read in whole if all(_usable(key, row[key]) for key in keys)] or whole[:1]
    if not whole:
        names = ", ".join(map(repr, list(row)[:4]))
        if not row:
            raise SchemaError(place, "an empty row", "remove it")
        raise SchemaError(place, f"no conversation in its keys ({names})", "give messages, or prompt and completion")
    used: set[str] = set()
    conversations = []
    for keys, read in whole:
        conversations.append(read(row, keys, place, ignored))
        used |= {*keys, *(("input", "history") if read is _asked else ())}
    questions = {key for key in ("instruction", "query") if not absent(row.get(key))}
    if questions & used and questions - used:
        asked, other = *questions & used, *questions - used
        raise SchemaError(
            f"{place}.{other}", f"{other} and {asked} both ask, and there is one reply", f"join them in {asked}"
        )
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
    return read_turns(turns, where, ignored)


def _completed(row: dict[str, Any], keys: tuple[str, ...], place: str, ignored: set[str]) -> list[Turn]:
    """A prompt, whose replies are not taught (weight None, but where one says 0), and its completion."""
    prompt, completion = (
        _side(row[key], role, f"{place}.{key}", ignored) for key, role in zip(keys, _SIDES, strict=True)
    )
    for where, message in prompt:
        if isinstance(message, dict) and message.get("role") == "assistant":
            if message.get("weight"):
                raise SchemaError(f"{where}.weight", "no message of a prompt is taught", MOVE)
            message.setdefault("weight", None)
    ends = [turns[at][1] for turns, at in ((prompt, -1), (completion, 0)) if turns]
    if len(ends) == 2 and all(isinstance(m, dict) and m.get("role") == "assistant" for m in ends):
        fact = "the prompt ends with a reply, and the completion begins with one"
        raise SchemaError(f"{place}.prompt", fact, "join them in the completion, or put the user turn between")
    return [*prompt, *completion]


_SIDES = ("user", "assistant")
MOVE = "remove the key, or move the message into the completion"


def _side(value: Any, role: str, place: str, ignored: set[str]) -> list[Turn]:
    if isinstance(value, str):
        return [(place, {"role": role, "content": _text(value, place)})]
    if isinstance(value, list):
        return read_turns(value, place, ignored)
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
            raise SchemaError(where, f"it is {kind_of(pair)}, not a pair of texts", "make it [asked, replied]")
        pairs += [(f"{where}[{side}]", _text(pair[side], f"{where}[{side}]")) for side in (0, 1)]
    about = () if keys[0] == "query" and not absent(row.get("instruction")) else ("input",)  # it is the instruction's
    asks = [_text(row[key], f"{place}.{key}") for key in (keys[0], *about) if not absent(row.get(key))]
    pairs.append((f"{place}.{keys[0]}", "\n\n".join(asks)))
    pairs.append((f"{place}.{keys[1]}", _text(row[keys[1]], f"{place}.{keys[1]}")))
    return [(where, {"role": _SIDES[i % 2], "content": text}) for i, (where, text) in enumerate(pairs)]


_DIALECTS: list[tuple[tuple[str, ...], Any]] = [
    *(((key,), _listed) for key in CONVERSATIONS),
    (("prompt", "completion"), _completed),
    (("instruction", "output"), _asked),
    (("query", "response"), _asked),
]


def as_asked(row: Any, place: str) -> Any:
    """A row that only asks, as one that `read_row` takes: a text as a user's message, messages under `prompt` as such,
    and a question without its reply with an empty one. Any other row as it is.

    >>> as_asked({"instruction": "Add", "input": "1 and 2"}, "x:1")
    {'instruction': 'Add', 'input': '1 and 2', 'output': ''}
    """
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if not isinstance(row, dict):
        return row
    pairs = [keys for keys, _ in _DIALECTS if len(keys) == 2]
    whole = any(all(not absent(row.get(key)) for key in keys) for keys, _ in _DIALECTS)
    asks = {ask: reply for ask, reply in reversed(pairs) if not absent(row.get(ask))}
    if whole or not asks or any(not absent(row.get(reply)) for _, reply in pairs):
        return row
    if len(asks) > 1:
        first, second = sorted(asks)[:2]
        raise SchemaError(f"{place}.{second}", f"{second} and {first} both ask", f"join them in {first}")
    ((ask, reply),) = asks.items()
    if isinstance(row[ask], list):
        return {**{key: value for key, value in row.items() if key not in (ask, reply)}, "messages": row[ask]}
    return {**row, reply: ""}


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
    """Whether the row's own flags say so. Raises SchemaError where it says that its reply is not wanted."""
    for key in PREFERRED:
        if _wanted(row, key) is False:
            fact = f"{key} is false: a reply that is not wanted (preference data)"
            raise SchemaError(f"{place}.{key}", fact, "remove the row, or the key where it means something else")
    flags = {key: row[key] for key in ROW_FLAGS if not absent(row.get(key))}
    return bool(flags) and not flag_of(flags, place)


def _wanted(row: dict[str, Any], key: str) -> bool | None:
    """Whether a key of preference data says that the reply is wanted; None where it is not there, or a class."""
    value = row.get(key)
    if key == "label" and not isinstance(value, bool) and absent(row.get("completion")):
        return None
    return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(str(value).lower())


def _tools(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    given = [found for key in TOOLS if not absent(row.get(key)) and (found := read_tools(row[key], f"{place}.{key}"))]
    if len(given) == 2 and given[0] != given[1]:
        raise SchemaError(place, "tools and functions differ", "keep one of them")
    return given[0] if given else []


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SchemaError(place, f"it is {kind_of(value)}", "make it a string")
    check_plain(value, place)
    return value
