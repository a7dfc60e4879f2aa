"""Which roles' contents a template wants as a list of parts, `[{"type": "text", "text": "hi"}]`.

Templates of models that also see pictures (SmolVLM, Idefics 3, LLaVA) loop over parts; a content that is a text they
leave out, or refuse. What they write of both forms is asked of the template itself, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from sftflow.foundation.errors import FormatError

Messages = list[dict[str, Any]]

_CALL = {"id": "probe0000", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}


def in_parts(messages: Messages, roles: Collection[str]) -> Messages:
    """The messages with the contents of these roles as parts.

    >>> in_parts([{"role": "user", "content": "hi"}], {"user"})
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}]
    """
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if m["role"] in roles and isinstance(m["content"], str)
        else m
        for m in messages
    ]


def roles_in_parts(render: Callable[[Messages], str]) -> frozenset[str]:
    """The roles whose text the template writes only when it comes in parts.   render: raises FormatError where the
    template refuses."""

    def written(messages: Messages, roles: Collection[str]) -> bool:
        try:
            text = render(in_parts(messages, roles))
        except FormatError:
            return False
        return all(m["content"] in text for m in messages)

    def message(role: str, **keys: Any) -> dict[str, Any]:
        return {"role": role, "content": f"zqparts{role}", **keys}

    exchange = [message("user"), message("assistant")]
    # The fewest first: a template that writes a content as it comes writes a list out, brackets and all.
    forms: tuple[frozenset[str], ...] = tuple(map(frozenset, ((), ("user",), ("assistant",), ("user", "assistant"))))
    found = next((roles for roles in forms if written(exchange, roles)), frozenset[str]())
    called = [message("user"), message("assistant", tool_calls=[_CALL]), message("tool", tool_call_id="probe0000")]
    for role, messages in (
        ("system", [message("system"), *exchange]),
        ("developer", [message("developer"), *exchange]),
        ("tool", called),
    ):
        if not written(messages, found) and written(messages, found | {role}):
            found |= {role}
    return found
