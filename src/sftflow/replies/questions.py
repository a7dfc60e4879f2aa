"""What a row of any dialect asks, and the row that is written of it with the model's reply.

{"question": "2+2?", "answer": "4", "id": 7}
    -> asked: user "2+2?"    reference: assistant "4"
    -> {"messages": [user "2+2?", assistant REPLY], "source": "FILE:1", "finish_reason": "stop",
        "reference": {"role": "assistant", "content": "4"}, "id": 7}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from sftflow.chat.columns import Columned, renamed
from sftflow.chat.exchanges import as_asked
from sftflow.chat.row_keys import READ, REFUSED
from sftflow.chat.schema import Conversation, Message, Part, conversation_of, parse_line, parse_row, text_message
from sftflow.chat.thoughts import ThoughtMarks, learn_thoughts, split_thoughts
from sftflow.chat.tool_format import learn_calls
from sftflow.chat.tool_parser import CallFormat, read_calls
from sftflow.checkpoint import Assistant
from sftflow.foundation.errors import ContextError, FormatError, SchemaError
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sampling import derived_seed

WRITTEN = ("source", "finish_reason", "reference", "seed", "near_ties", "meta")
"""keys of a row that is written, beside `messages` and `tools`"""


@dataclass(frozen=True, slots=True)
class Question:
    """number: of the row, from 1, as FILE:NUMBER has it.   asked: the conversation up to its last message of a user or
    a tool, with the row's other keys.   reference: the reply that the row has itself."""

    number: int
    asked: Conversation
    reference: Message | None
    request: GenerationRequest


def read_question(payload: Any, place: str, system: str | None = None) -> tuple[Conversation, Message | None]:
    """(what a row asks, its own reply or None).   payload: a line's bytes, a parsed row, or a Conversation.
    system: in front of it, as the row's key `system` would be.

    Raises DataError or SchemaError where the row is none, or asks nothing.
    """
    row, columns = payload if isinstance(payload, Columned) else (payload, None)
    row = parse_line(row, place) if isinstance(row, bytes) else row
    named = renamed(row, columns, place, set())[0] if columns else row
    asked = as_asked(named, place)
    found = conversation_of(asked, place) if asked is not named or not columns else parse_row(row, place, columns)
    if not found.messages:
        what = "plain text" if found.document else "a row of tokens"
        raise SchemaError(place, f"{what}: it has no message that could be asked", "give its messages")
    messages = [replace(m, weight=0) if m.weight is None else m for m in found.messages]
    last = max((i for i, m in enumerate(messages) if m.role in ("user", "tool")), default=-1)
    if last < 0:
        raise SchemaError(place, "no user message: nothing is asked", "add one, or remove the row")
    asked, behind = messages[: last + 1], messages[last + 1 :]
    if any(m.role != "assistant" for m in behind):
        fact = f"a {behind[-1].role} message behind the last user message"
        raise SchemaError(place, fact, "put it in front, or remove the row")
    if len(behind) > 1:
        raise SchemaError(place, "it ends with two replies in a row", "join them")
    if system:
        if asked[0].role not in ("system", "developer"):
            asked.insert(0, text_message("system", system))
        elif asked[0].text != system:
            fact = "the row has a system message of its own, which is another than --system"
            raise SchemaError(place, fact, "remove it, or leave --system out")
    reference = behind[0] if behind and (behind[0].text or behind[0].tool_calls) else None
    return replace(found, messages=tuple(asked), source=place), reference


class Asker:
    """Asks one model, and reads its replies as the chat and the server read them."""

    def __init__(self, assistant: Assistant, system: str | None, seed: int, **sampling: Any) -> None:
        """seed: of the file; each row's own is derived from it and the row's number.   sampling: as for
        `Assistant.request`."""
        self.assistant, self.system, self.seed, self.sampling = assistant, system, seed, sampling
        self.thoughts: ThoughtMarks | None = learn_thoughts(assistant.renderer)
        self.calls: CallFormat | None = learn_calls(assistant.renderer)
        self._shown = self.thoughts.shown(assistant.renderer) if self.thoughts else ()

    def question(self, number: int, payload: Any, place: str) -> Question:
        """Raises DataError, SchemaError, FormatError where a row cannot be asked, ContextError where it is too long."""
        asked, reference = read_question(payload, place, self.system)
        assistant = self.assistant
        name, context = assistant.renderer.format.name, assistant.engine.context
        if asked.tools and self.calls is None:
            fact = f"the {name} format has no tool calls that could be read back"
            raise FormatError(place, fact, "remove its tools, or take a model of another format")
        seed = derived_seed(self.seed, number)
        request = assistant.request(asked, seed=seed, shown=self._shown, **self.sampling)
        if missing := assistant.renderer.missing_from_prompt(asked):
            raise FormatError(f"{place}.{missing[0]}", f"the {name} format leaves it out", "remove it, or the row")
        if len(request.prompt_ids) >= context:
            fact = f"its prompt has {len(request.prompt_ids):,} tokens, and the model's context {context:,}"
            raise ContextError(place, fact, "shorten it, or remove the row")
        return Question(number, asked, reference, request)

    def row(self, question: Question, reply: Reply) -> dict[str, Any]:
        """The row that is written: one to train on, too. What did not end by itself has weight 0."""
        asked = question.asked
        message = self._message(question, reply)
        ended = "tool_calls" if message.tool_calls and reply.finish_reason == "stop" else reply.finish_reason
        out = replace(asked, messages=(*asked.messages, message)).to_row()
        out |= {"source": asked.source, "finish_reason": ended}
        if question.reference is not None:
            out["reference"] = question.reference.to_json()
        if question.request.temperature:
            out["seed"] = question.request.seed
        if reply.near_ties:
            out["near_ties"] = len(reply.near_ties)
        return {**out, **other_keys(asked.meta)}

    def _message(self, question: Question, reply: Reply) -> Message:
        text, thought, weight = reply.text, "", int(reply.finish_reason == "stop")
        if self.thoughts is not None:
            begun = self.thoughts.begun(self.assistant.renderer.decode(question.request.prompt_ids[-64:]))
            thought, text = split_thoughts(self.thoughts, text, begun)
        calls: list[tuple[str, dict[str, Any]]] = []
        if self.calls is not None and question.asked.tools:
            text, calls = read_calls(self.calls, question.asked.tools, text)
        parts: tuple[Part, ...] = (Part("text", text),) if text or not calls else ()
        if text == reply.text and not question.request.stop_texts:  # else its calculator's calls cannot be told apart
            decoder, ids = self.assistant.engine.reply_decoder, reply.ids[: reply.n_generated]
            found = decoder.parts(ids if weight else decoder.without_open_call(ids))
            parts = found if any(p.kind != "text" for p in found) else parts
        tool_calls = tuple(
            {"id": _identity(question.number, i), "type": "function", "function": {"name": name, "arguments": words}}
            for i, (name, words) in enumerate((name, json.dumps(given, ensure_ascii=False)) for name, given in calls)
        )
        return Message("assistant", parts, tool_calls, reasoning_content=thought or None, weight=weight)


def _identity(row: int, call: int) -> str:
    """Of a call: nine letters and digits, on which some templates insist; the same whenever the row is asked."""
    return hashlib.sha256(f"{row}:{call}".encode()).hexdigest()[:9]


def other_keys(meta: dict[str, Any]) -> dict[str, Any]:
    """A row's other keys as they are written: under their own names, but for those that would be read as something
    else, which stand in `meta`.

    >>> other_keys({"id": 7, "source": "wiki"})
    {'id': 7, 'meta': {'source': 'wiki'}}
    """
    apart = {key: value for key, value in meta.items() if key in READ or key in REFUSED or key in WRITTEN}
    own = {key: value for key, value in meta.items() if key not in apart}
    return {**own, "meta": apart} if apart else own
