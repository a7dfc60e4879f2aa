"""What is said of a row that is of no dialect: what it looks like, and what can be done with it."""

from __future__ import annotations

from typing import Any

from sftflow.chat.exchanges import CANONICAL, OTHERS
from sftflow.chat.row_keys import CONVERSATIONS, READ
from sftflow.foundation.errors import SchemaError

_TURN = {"role", "from", "user", "human"}


def unknown_shape(row: dict[str, Any], place: str) -> SchemaError:
    """The error of a row that is no conversation under any names that are known."""
    if not row:
        return SchemaError(place, "an empty row", "remove it")
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        fact = "a tree of replies: several conversations, of which it is not said which to teach"
        return SchemaError(f"{place}.prompt", fact, "write each path that shall be taught as a row of messages")
    names = ", ".join(map(repr, list(row)[:4])) + (", ..." if len(row) > 4 else "")
    fact = f"no conversation in its keys ({names})"
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        return SchemaError(place, f"objects by their names ({names}), not a row", "write each of them as a row")
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) and not _TURN.isdisjoint(v) for v in value):
            return SchemaError(place, fact, f"if {key} is the conversation: columns: {{{key}: messages}}")
    lower = {key.lower(): key for key in row}
    for ask, reply in (*CANONICAL, *OTHERS):
        if ask in lower and reply in lower:
            said = ", ".join(f"{lower[key]}: {key}" for key in READ if key in lower and lower[key] != key)
            return SchemaError(place, fact, f"name its columns: columns: {{{said}}}")
    remedy = f"give {CONVERSATIONS[0]}, or name its columns: columns: {{ONE: prompt, OTHER: completion}}"
    return SchemaError(place, fact, remedy)
