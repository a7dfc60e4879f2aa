"""The dialects that rows are written in -> messages in the OpenAI shape, not yet validated.

{"messages": [...], "tools"?: [...]}                       OpenAI chat, the canonical shape
[{"role": ..., "content": ...}, ...]                       a bare list of messages
{"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT
{"prompt": ..., "completion": ...} and its like            one exchange: `exchanges`
{"input_ids": [...], "mask" or "labels": [...]}            tokens already: `pretokenized`
{"text": "..."}                                            plain text: `plain_text`

What each key means: `row_keys`. Tables with other names say which is which: `columns`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sftflow.chat.columns import Columns, renamed
from sftflow.chat.exchanges import CANONICAL, OTHERS, Pair, pairs_of, read_pair, turns_of_ready
from sftflow.chat.plain_text import ENDS, TEXT, Document, is_alone, read_text_row
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
from sftflow.chat.shapes import require_clear, require_whole, unknown_shape
from sftflow.chat.tool_calls import read_json, read_tools
from sftflow.chat.turns import Turn, read_turns, weight_of
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of

_WITH_ANY = {*SYSTEM, *TOOLS, *ROW_FLAGS}


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """conversations: what each dialect that the row is whole in makes of it.   tokens, document: the row, where it is
    such.
    weight: how much the loss of its replies counts, above 0 (0 is that of each message).   meta: the row's other keys.
    ignored: names of keys that nothing was made of, those of messages as `messages[].name`."""

    conversations: list[list[Turn]]
    tokens: Pretokenized | None = None
    document: Document | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    weight: int | float = 1
    meta: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_row(row: Any, place: str, columns: Columns | None = None, *, plain: bool = False) -> RawRow:
    """One row of any dialect.   columns: the user's names of keys by ours.   plain: the recipe says that it is plain
    text.

    Raises SchemaError where it is of none, or a key cannot be honoured."""
    ignored: set[str] = set()
    named: frozenset[str] = frozenset()
    if columns:
        row, named = renamed(row, columns, place, ignored)
    if plain:
        return _of_text(row, place, ignored, declared=True)
    bare = row["messages"] if isinstance(row, dict) and len(row) == 1 and "messages" in row else row
    if isinstance(bare, list):
        conversations = [read_turns(bare, f"{place}.messages", ignored)]
        return RawRow(conversations=conversations, ignored=tuple(sorted(ignored)))
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}", "make it an object with messages")
    row = {key: value for key, value in row.items() if value is not None}
    if not absent(row.get(IDS)) or (row.get(IDS) == [] and not _claimed(row)):
        return _of_tokens(row, place)
    if isinstance(row.get("ids"), list) and not _claimed(row):
        raise SchemaError(f"{place}.ids", "a list under a name that nobody reads", f"call it {IDS}")
    if row.get("messages") and row.get("chosen") == row["messages"]:  # its rows for instruction tuning keep both
        refuse({key: value for key, value in row.items() if key not in ("chosen", "rejected")}, REFUSED, place)
    else:
        refuse(row, REFUSED, place)
    conversations, used = _conversations(row, place, ignored, named)
    if not conversations:
        return _of_text(row, place, ignored, declared=False)
    system = _system(row, place)
    weight = _weight(row, ROW_FLAGS, place)
    for turns in conversations:
        if system is not None:
            _put_in_front(system, turns, place)
        for _, message in () if weight else turns:
            if isinstance(message, dict):
                message["weight"] = 0
    used |= _WITH_ANY
    used |= {key for key in PREFERRED if key in row and _wanted(row, key) is not None}
    meta = {key: value for key, value in row.items() if key not in used}
    ignored |= {key for key, value in meta.items() if not absent(value)}
    found = RawRow(conversations=conversations, tools=_tools(row, place), meta=meta, ignored=tuple(sorted(ignored)))
    return replace(found, weight=weight) if 0 < weight < 1 else found


def _claimed(row: dict[str, Any]) -> bool:
    """Whether a key of the row holds something of a conversation."""
    return any(not absent(row.get(key)) for key in (*CONVERSATIONS, *(key for pair in CANONICAL for key in pair)))


def _of_text(row: Any, place: str, ignored: Collection[str], *, declared: bool) -> RawRow:
    found = read_text_row(row, place, ignored, declared=declared)
    meta = {key: value for key, value in row.items() if key not in (TEXT, ENDS, *ROW_FLAGS)}
    return RawRow(
        conversations=[], document=found.document, weight=found.weight, meta=meta, ignored=tuple(found.ignored)
    )


def _of_tokens(row: dict[str, Any], place: str) -> RawRow:
    refuse({key: value for key, value in row.items() if key not in TOKEN_KEYS}, REFUSED, place)
    tokens = read_pretokenized(row, place)
    weight = _weight(row, [key for key in ROW_FLAGS if key not in TOKEN_KEYS], place)
    if not weight:
        tokens = replace(tokens, mask=(0,) * len(tokens.ids), weights=None)
    meta = {key: value for key, value in row.items() if key not in (IDS, LENGTHS, *TOKEN_KEYS, *ROW_FLAGS)}
    ignored = sorted(key for key, value in meta.items() if not absent(value))
    return RawRow(conversations=[[]], tokens=tokens, weight=weight or 1, meta=meta, ignored=tuple(ignored))


# ---- the dialects


def _conversations(
    row: dict[str, Any], place: str, ignored: set[str], named: frozenset[str]
) -> tuple[list[list[Turn]], set[str]]:
    """The conversation in each dialect that the row is whole in, and the keys of these; none where it is plain text.
    named: keys that the user's `columns` have made; where they are of a dialect, only that counts."""
    whole: list[tuple[str] | Pair] = [(key,) for key in CONVERSATIONS if key in row]
    whole += pairs_of(row, listed=any(_usable(key, row[key]) for (key, *_) in whole))
    whole = [keys for keys in whole if all(_usable(key, row[key]) for key in keys)] or whole[:1]
    if named:
        most = max((len(named.intersection(keys)) for keys in whole), default=0)
        whole = [keys for keys in whole if len(named.intersection(keys)) == most]
    if not whole and isinstance(row.get("text"), str):
        turns = turns_of_ready(row[TEXT], f"{place}.{TEXT}")
        if not turns and not (is_alone(row) or TEXT in named):
            fact = "plain text beside other keys: nothing is asked, and nothing replied"
            remedy = (
                "if all of it shall be taught as text: {source: text, path: FILE}; else give messages, or name its "
            )
            raise SchemaError(f"{place}.{TEXT}", fact, f"{remedy}columns: columns: {{text: prompt, OTHER: completion}}")
        return [turns] if turns else [], {TEXT}
    if not whole:
        raise unknown_shape(row, place)
    if whole[0] in OTHERS:
        require_clear(row, whole[0], place, named=named.issuperset(whole[0]))
    elif whole[0] in CANONICAL[1:]:
        require_whole(row, whole[0], place)
    used: set[str] = set()
    conversations = []
    for keys in whole:
        if len(keys) == 1:
            turns, of = _listed(row, keys[0], place, ignored), set(keys)
        else:
            turns, of = read_pair(row, keys, place, ignored, named)
        conversations.append(turns)
        used |= of
    asked = [keys[0] for keys in whole if keys in CANONICAL[1:]]
    others = [key for key in ("instruction", "query") if key not in asked and not absent(row.get(key))]
    if asked and others and not named:
        fact = f"{others[0]} and {asked[0]} both ask, and there is one reply"
        raise SchemaError(f"{place}.{others[0]}", fact, f"join them in {asked[0]}")
    if "history" not in used and not absent(row.get("history")):
        raise SchemaError(f"{place}.history", f"a history beside {whole[0][0]}", "put its turns into the messages")
    return conversations, used


def _usable(key: str, value: Any) -> bool:
    """Whether a dialect's value is not empty, nor a text where only JSON would do."""
    is_words = isinstance(value, str) and key in CONVERSATIONS and not value.lstrip().startswith("[")
    return not absent(value) and not is_words


def _listed(row: dict[str, Any], key: str, place: str, ignored: set[str]) -> list[Turn]:
    where = f"{place}.{key}"
    turns = read_json(row[key], where) if isinstance(row[key], str) else row[key]
    if not isinstance(turns, list):
        raise SchemaError(where, f"it is {kind_of(turns)}", "make it a list of messages")
    return read_turns(turns, where, ignored)


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


def _weight(row: dict[str, Any], keys: Iterable[str], place: str) -> int | float:
    """How much the row's own flags, of these keys, say that it is taught. Raises SchemaError where it says that its
    reply is not wanted."""
    for key in PREFERRED:
        if key in row and _wanted(row, key) is False:
            fact = f"{key} is false: a reply that is not wanted (preference data)"
            raise SchemaError(f"{place}.{key}", fact, "remove the row, or the key where it means something else")
    flags = {key: row[key] for key in keys if not absent(row.get(key))}
    return weight_of(flags, place) if flags else 1


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
