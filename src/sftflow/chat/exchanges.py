"""Rows that are one exchange: what is asked under one key, what is replied under another -> turns.

{"prompt": text | messages, "completion": text | messages}
{"instruction": ..., "input"?: ..., "output": ...}          Alpaca, with "history"; also query, response
{"question": ..., "answer": ...}                            and the other names of OTHERS
{"text": "### Instruction: ... ### Response: ..."}          ready text: `ready_text`
"""

from __future__ import annotations

import re
from typing import Any

from sftflow.chat.ready_text import is_ready, parts_of_prompt, turns_of_text
from sftflow.chat.row_keys import ASKS, CONVERSATIONS, THOUGHTS, absent
from sftflow.chat.turns import Turn, read_turns
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of

Pair = tuple[str, str]
"""(what asks, what replies)"""

CANONICAL: tuple[Pair, ...] = (("prompt", "completion"), ("instruction", "output"), ("query", "response"))
"""read beside a list of messages, too, which must then say the same"""
OTHERS: tuple[Pair, ...] = (
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("user", "assistant"),
    ("input", "output"),
    ("query", "answers"),
)
"""names that tables use for other things, too: they count where there is no list of messages"""
ABOUT = {"instruction": ("input", "context"), "query": ("input",)}
"""what may stand below what is asked, behind a blank line"""
GSM8K = re.compile(r"<<[^<>\n]*=[^<>\n]*>>|^####[ \t]*\$?-?[\d.,]+\s*\Z", re.MULTILINE)
"""what the answers of that set have in them: a calculator's mark, or the result at the end"""
_SWITCHES = ("", "on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high")
_SIDES = ("user", "assistant")
MOVE = "remove the key, or move the message into the completion"


def pairs_of(row: dict[str, Any], *, listed: bool) -> list[Pair]:
    """The pairs whose keys the row has.   listed: it has a list of messages."""
    found = [pair for pair in CANONICAL if pair[0] in row and pair[1] in row]
    if listed:
        return found
    more = [pair for pair in OTHERS if pair[0] in row and pair[1] in row]
    if ("query", "answers") in more and absent(row.get("tools")):
        more.remove(("query", "answers"))
    if ("input", "output") in more and len(found) + len(more) > 1:  # the input belongs to another question
        more.remove(("input", "output"))
    return [*found, *more]


def read_pair(
    row: dict[str, Any], pair: Pair, place: str, ignored: set[str], named: frozenset[str]
) -> tuple[list[Turn], set[str]]:
    """The turns of an exchange, and the keys that they are made of.   named: keys that the user has named; where the
    pair is among them, reasoning is what was named so."""
    used: set[str] = set(pair)
    texts = isinstance(row[pair[0]], str) and isinstance(row[pair[1]], str)
    if pair == ("query", "answers"):
        turns = [
            (f"{place}.query", {"role": "user", "content": _text(row["query"], f"{place}.query")}),
            *read_turns([{"role": "function_call", "content": row["answers"]}], f"{place}.answers", ignored),
        ]
    elif pair == CANONICAL[0] or (pair[0] not in ABOUT and not texts):
        turns = _completed(row, pair, place, ignored)
    else:
        turns = _asked(row, pair, place, ignored)
        used |= {"history", *ABOUT.get(pair[0], ())}
    thoughts = {key: row[key] for key in THOUGHTS if _is_thought(row.get(key), row[pair[1]])}
    if thoughts and (not named.issuperset(pair) or not named.isdisjoint(thoughts)):
        used |= thoughts.keys()
        where, reply = turns.pop()
        turns += read_turns([{**reply, **thoughts}], where, ignored)
    return turns, used


def _is_thought(value: Any, reply: Any) -> bool:
    """Whether a value is the reasoning of a reply that is a text without it; not a switch, or a judge's mark."""
    texts = isinstance(value, str) and isinstance(reply, str)
    return texts and value.lower() not in _SWITCHES and not reply.lstrip().startswith("<think>")


def _completed(row: dict[str, Any], keys: Pair, place: str, ignored: set[str]) -> list[Turn]:
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
        fact = f"the {keys[0]} ends with a reply, and the {keys[1]} begins with one"
        raise SchemaError(f"{place}.{keys[0]}", fact, f"join them in {keys[1]}, or put the user turn between")
    return [*prompt, *completion]


def _side(value: Any, role: str, place: str, ignored: set[str]) -> list[Turn]:
    if isinstance(value, str):
        text = _text(value, place)
        return _prompt(text, place) if role == "user" else [(place, {"role": role, "content": text})]
    if isinstance(value, list):
        return read_turns(value, place, ignored)
    raise SchemaError(place, f"it is {kind_of(value)}", "make it a text or a list of messages")


def _prompt(text: str, place: str) -> list[Turn]:
    """What is asked as turns: without the headers of Alpaca's ready text around it."""
    if not is_ready(text):
        return [(place, {"role": "user", "content": text})]
    system, asked = parts_of_prompt(text)
    first = [(place, {"role": "system", "content": system})] if system else []
    return [*first, (place, {"role": "user", "content": asked})]


def _asked(row: dict[str, Any], keys: Pair, place: str, ignored: set[str]) -> list[Turn]:
    """Alpaca, and its like: earlier exchanges, then what is asked and replied."""
    history = [] if absent(row.get("history")) else row["history"]
    turns: list[Turn] = []
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        turns, history = read_turns(history, f"{place}.history", ignored), []
    if not isinstance(history, list):
        raise SchemaError(f"{place}.history", f"it is {kind_of(history)}", "make it a list of [asked, replied] pairs")
    for number, pair in enumerate(history):
        where = f"{place}.history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SchemaError(where, f"it is {kind_of(pair)}, not a pair of texts", "make it [asked, replied]")
        for side, role in enumerate(_SIDES):
            turns.append((f"{where}[{side}]", {"role": role, "content": _text(pair[side], f"{where}[{side}]")}))
    ask, reply = keys
    about = ABOUT.get(ask, ())
    if ask == "query" and not absent(row.get("instruction")):
        about = ()  # the input is the instruction's
    asks = [_text(row[key], f"{place}.{key}") for key in (ask, *about) if not absent(row.get(key))]
    if len(asks) == 1 + len(about) == 3:
        raise SchemaError(f"{place}.context", "context beside input: both stand below the instruction", "join them")
    *system, asked = _prompt("\n\n".join(asks), f"{place}.{ask}")
    turns = [*system, *turns, asked]
    turns.append((f"{place}.{reply}", {"role": "assistant", "content": _text(row[reply], f"{place}.{reply}")}))
    return turns


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
    pairs = [*CANONICAL, *OTHERS[:-1]]
    there = {key: value for key, value in row.items() if not absent(value)}
    asks = {ask: reply for ask, reply in reversed(pairs) if ask in (there.keys() & {*ASKS} or there)}
    if [*asks] == ["question"] and GSM8K.search(str(there.get("answer"))):
        rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
        return {**rest, "prompt": row["question"], "completion": row["answer"]}  # to compare with, not to teach
    asked = asks and all(isinstance(row[ask], str | list) for ask in asks)
    if not asked or there.keys() & {*CONVERSATIONS, *(reply for _, reply in pairs)}:
        return row
    if len(asks) > 1:
        first, second = sorted(asks)[:2]
        raise SchemaError(f"{place}.{second}", f"{second} and {first} both ask", f"join them in {first}")
    ((ask, reply),) = asks.items()
    if isinstance(row[ask], list):
        return {**{key: value for key, value in there.items() if key != ask}, "messages": row[ask]}
    return {**there, reply: ""}


def turns_of_ready(text: str, place: str) -> list[Turn]:
    """The turns of a row that is one text; [] where it is plain text. Raises SchemaError as `turns_of_text`."""
    found = turns_of_text(_text(text, place), place)
    return [(place, {"role": role, "content": said}) for role, said in found]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SchemaError(place, f"it is {kind_of(value)}", "make it a string")
    check_plain(value, place)
    return value
