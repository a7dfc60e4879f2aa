"""`/v1/chat/completions`: the body, what is asked of the engine, and replies in the OpenAI shape.

A plain answer is made of the pieces that a stream would have sent, so that the two cannot differ.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from sftflow.chat.tool_parser import Call, CallReader, joined
from sftflow.generation.request import Delta, GenerationRequest, TokenLogprob
from sftflow.serving.errors import wrong
from sftflow.serving.logprobs import chat_logprobs
from sftflow.serving.model_entry import SamplingParams, Served
from sftflow.serving.prompt import chat_ids, conversation_of
from sftflow.serving.schemas import MAX_LOGPROBS, ModelBody, SamplingBody

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class RenderBody(ModelBody):
    """POST /v1/render."""

    messages: list[Any] = Field(min_length=1)
    tools: list[Any] | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("none",),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
    }

    messages: list[Any] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: str | None = None

    @property
    def offered(self) -> list[Any]:
        """The tools that the model is told of: with `none` it may not call any, so it is not told of them."""
        return [] if self.tool_choice == "none" else self.tools or []


def render_ids(served: Served, messages: Sequence[Any], tools: Sequence[Any]) -> tuple[int, ...]:
    """The exact prompt of a chat. Raises ApiError 400."""
    conversation = conversation_of(messages, tools)
    if conversation.tools and served.calls is None:
        fact = f"the {served.assistant.renderer.format.name} chat format has no tool calls that could be read back"
        raise wrong("tools", fact, "unsupported_parameter")
    return chat_ids(served.assistant, conversation)


class ChatAnswer:
    """The shape of the answer to one request; `choice` for each of its replies."""

    id_prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, body: ChatBody) -> None:
        """Reads the prompt, which takes its time. Raises ApiError 400."""
        if body.top_logprobs and not body.logprobs:
            raise wrong("top_logprobs", "it needs logprobs: true")
        self.served, self.body = served, body
        prompt = render_ids(served, body.messages, body.offered)
        self.n_prompt = len(prompt)
        room = served.context - len(prompt)
        limit = min(body.max_completion_tokens or body.max_tokens or room, room)  # an upper bound: what fits is less
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.requests: list[GenerationRequest] = SamplingParams.of(served.assistant, body).requests(
            body, prompt, limit, logprobs=logprobs
        )

    def choice(self, index: int) -> ChatChoice:
        return ChatChoice(self.served, self.body)


class ChatChoice:
    """One reply in pieces, each the `delta` of a chunk with its log-probabilities."""

    def __init__(self, served: Served, body: ChatBody) -> None:
        self._table, self._silent = served.table, served.silent
        self._logprobs = bool(body.logprobs)
        offered = body.offered
        self._reader = CallReader(served.calls, offered) if offered and served.calls is not None else None
        self._tokens: list[TokenLogprob] = []  # of text that has not been given out
        self._n_calls = 0
        self.finish_reason: str | None = None

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def is_large(self, delta: Delta) -> bool:
        return self._logprobs and len(self._tokens) + len(delta.tokens) > 32  # held back with the text of a call

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one piece of the reply; the last one says why it ended."""
        self._tokens += [t for t in delta.tokens if t.id not in self._silent]
        final = delta.reply is not None
        pieces: list[str | Call] = [delta.text] if delta.text else []
        if self._reader is not None:
            pieces = joined(self._reader.feed(delta.text) + (self._reader.flush() if final else []))
        out = []
        for piece in pieces:
            if isinstance(piece, str):
                out.append(self._chunk({"content": piece}))
            else:
                out.append(self._chunk({"tool_calls": [self._call(piece)]}))
        if final:
            assert delta.reply is not None
            self.finish_reason = "tool_calls" if self._n_calls else delta.reply.finish_reason
            out.append({**self._chunk({}), "finish_reason": self.finish_reason})
        return out

    def _chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and self._tokens:
            logprobs = {"content": chat_logprobs(self._table, self._tokens), "refusal": None}
            self._tokens = []
        return {"delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _call(self, call: Call) -> dict[str, Any]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        if any("\ud800" <= c <= "\udfff" for c in arguments):  # half a pair, which no UTF-8 can hold
            arguments = json.dumps(call.arguments)
        self._n_calls += 1
        # Nine letters and digits: some templates insist on that when the call comes back as history.
        identity = "".join(secrets.choice(_ALPHABET) for _ in range(9))
        function = {"name": call.name, "arguments": arguments}
        return {"index": self._n_calls - 1, "id": identity, "type": "function", "function": function}

    def whole(self, chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The choice of a plain answer, from its chunks."""
        content = "".join(c["delta"].get("content", "") for c in chunks)
        calls = [call for c in chunks for call in c["delta"].get("tool_calls", [])]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        logprobs = None
        if self._logprobs:
            content_logprobs = [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]]
            logprobs = {"content": content_logprobs, "refusal": None}
        return {"message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}
