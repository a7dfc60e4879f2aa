"""What a recipe declares of conversations before they are rendered: `join_turns` and `turns: last`.

join_turns: true      user A | user B | assistant C | assistant D   ->   user A, a blank line, B | assistant C ... D
turns: last           user A | assistant B | user C | assistant calls | tool | assistant D   ->   B gets weight 0
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from sftflow.chat.schema import Conversation, Message, Part
from sftflow.foundation.errors import SchemaError

JOINED = ("user", "assistant")
BLANK_LINE = "\n\n"


def has_turns_in_a_row(conversation: Conversation) -> bool:
    """Whether two messages of the user's, or two of the assistant's, follow each other: what `join_turns` joins."""
    return any(a.role == b.role and a.role in JOINED for a, b in pairwise(conversation.messages))


def join_turns(conversation: Conversation) -> Conversation:
    """Consecutive messages of the user, and of the assistant, as one each, with a blank line between their texts.
    Raises SchemaError where that could not say the same: calls or an answer in front of reasoning, calls in front of
    an answer, other weights or names."""
    if not has_turns_in_a_row(conversation):
        return conversation
    out: list[Message] = []
    for turn, message in enumerate(conversation.messages):
        if out and message.role in JOINED and out[-1].role == message.role:
            out[-1] = _joined(out[-1], message, f"{conversation.source}.messages[{turn}]")
        else:
            out.append(message)
    return replace(conversation, messages=tuple(out))


def _joined(first: Message, second: Message, place: str) -> Message:
    cannot = "it cannot be joined with the message before it"
    for key in ("weight", "name", "tool_call_id"):
        if getattr(first, key) != getattr(second, key):
            raise SchemaError(place, f"{cannot}: another {key}", f"give both the same {key}, or join them in the row")
    thoughts = [text for text in (first.reasoning_content, second.reasoning_content) if text]
    if second.reasoning_content and (first.text or first.tool_calls):
        raise SchemaError(place, f"{cannot}: reasoning behind a reply", "remove it, or put a user turn between")
    if first.tool_calls and second.text:
        raise SchemaError(place, f"{cannot}: a reply behind tool calls", "put the tools' results between")
    between = (Part("text", BLANK_LINE),) if first.text and second.text else ()
    parts = tuple(part for part in (*first.parts, *between, *second.parts) if part.text or part.kind != "text")
    if all(part.kind == "text" for part in parts):
        parts = (Part("text", "".join(part.text for part in parts)),) if parts else first.parts or second.parts
    return replace(
        first,
        parts=parts,
        tool_calls=(*first.tool_calls, *second.tool_calls),
        reasoning_content=BLANK_LINE.join(thoughts) or None,
    )


def only_last(conversation: Conversation) -> Conversation:
    """Weight 0 for the assistant's messages before its last turn: all that it wrote behind the last message of another
    than a tool, so calls and the answer behind their results; plain text has no turns, and stays whole. Raises
    SchemaError for a row of tokens."""
    if conversation.document is not None:
        return conversation
    if conversation.tokens is not None:
        fact = "turns: last, but a row of tokens does not say where its turns are"
        raise SchemaError(conversation.source, fact, "leave turns out, and say what is taught by the row's mask")
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=0)
    first = max((i + 1 for i, m in enumerate(messages[:last]) if m.role not in ("assistant", "tool")), default=0)
    kept = (replace(m, weight=0) if m.role == "assistant" and m.weight else m for m in messages[:first])
    return replace(conversation, messages=(*kept, *messages[first:]))
