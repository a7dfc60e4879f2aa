"""What a format cannot order, joined by one rule (docs/serving.md has it in a table), so that nothing is left out.

    system s, user a, user b, system t, assistant c, user d    ->    system s, user "a⏎⏎b⏎⏎t", assistant c, user d

Agent programs send such conversations, and many formats refuse them: they take turns of user and assistant behind one
system message. Only what is refused as it stands is joined, and only when serving; in training data it is a mistake.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from sftflow.chat.schema import Conversation, Message, Part, text_message


def joined_ways(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation by the rule, the least changed first: developer messages are system messages; then turns are
    joined; reasoning is a part of what was said; the opening system message is a part of the first user turn. Then all
    of it again with other identities of calls, where they are not such as every format takes."""
    yield from _orders(conversation)
    renamed = replace(conversation, messages=tuple(_identified(m) for m in conversation.messages))
    if renamed != conversation:
        yield renamed
        yield from _orders(renamed)


def _identified(message: Message) -> Message:
    """Its calls by nine letters and digits, as some templates insist on."""

    def short(identity: str) -> str:
        plain = len(identity) == 9 and identity.isascii() and identity.isalnum()
        return identity if plain else hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    calls = tuple({**c, "id": short(c["id"])} if isinstance(c.get("id"), str) else c for c in message.tool_calls)
    answered = message.tool_call_id
    return replace(message, tool_calls=calls, tool_call_id=None if answered is None else short(answered))


def _orders(conversation: Conversation) -> Iterator[Conversation]:
    known = [list(conversation.messages)]
    messages = [replace(m, role="system") if m.role == "developer" else m for m in conversation.messages]
    joined = (
        in_turns(messages, system=system, reasoning=reasoning) for system, reasoning in product((True, False), repeat=2)
    )
    for way in (messages, *joined):
        if way not in known:
            known.append(way)
            yield replace(conversation, messages=tuple(way))


def in_turns(messages: Sequence[Message], *, system: bool, reasoning: bool) -> list[Message]:
    """system: whether there may be a system message, in front.   reasoning: whether an assistant turn may have some."""
    n_system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    if not system or (n_system and n_system < len(messages) and messages[n_system].role != "user"):
        n_system = 0
    turns: list[Message] = []
    for number, message in enumerate(messages):
        if message.role == "system" and number >= n_system:
            message = replace(message, role="user")
        elif message.reasoning_content and not reasoning:
            thought = text_message("assistant", message.reasoning_content)
            message = replace(_together(thought, message), tool_calls=message.tool_calls, reasoning_content=None)
        if not turns and message.role == "assistant":
            turns.append(text_message("user", ""))
        before = turns[-1] if turns else None
        calls = message.tool_calls or (before and before.tool_calls)
        if before and before.role == message.role != "tool" and not calls:
            turns[-1] = _together(_named(before), _named(message))
        else:
            turns.append(message)
    return turns


def _together(first: Message, second: Message) -> Message:
    """Both as one, with a blank line between; what is empty adds none."""
    parts = (*first.parts, Part("text", "\n\n"), *second.parts) if first.text and second.text else ()
    thoughts = [m.reasoning_content for m in (first, second) if m.reasoning_content]
    return Message(second.role, parts or first.parts + second.parts, reasoning_content="\n\n".join(thoughts) or None)


def _named(message: Message) -> Message:
    """Who speaks is said, where a turn has what several said."""
    if not message.name or not message.text:
        return message
    return replace(message, parts=(Part("text", f"{message.name}: "), *message.parts), name=None)
