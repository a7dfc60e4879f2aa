"""`/v1/chat/completions`: what is asked of the engine, and replies in the OpenAI shape."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sftflow.chat.tool_parser import Call, CallReader, joined
from sftflow.generation.request import Delta, TokenLogprob
from sftflow.serving.errors import wrong
from sftflow.serving.logprobs import chat_logprobs
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.prompt import chat_ids, requests_for
from sftflow.serving.responses import Chunk, ResponseShape
from sftflow.serving.schemas import ChatBody

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def chat_response(model: ServedModel, body: ChatBody) -> ResponseShape:
    """Reads the prompt, which takes its time. Raises ApiError 400."""
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "it needs logprobs: true")
    prompt = chat_ids(model, body.messages, body.offered)
    limit = body.max_completion_tokens or body.max_tokens  # an upper bound: what fits is less
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = requests_for(model.assistant, body, prompt, limit, logprobs=logprobs)
    choices = [ChatChoice(model, body) for _ in requests]
    return ResponseShape(model=model, body=body, n_prompt=len(prompt), requests=requests, choices=choices)


class ChatChoice:
    """One reply: each chunk is the `delta` of a message, with its log-probabilities."""

    id_prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, body: ChatBody) -> None:
        self._model = model
        self._logprobs = bool(body.logprobs)
        offered = body.offered
        self._reader = CallReader(model.calls, offered) if offered and model.calls is not None else None
        self._tokens: list[TokenLogprob] = []  # of text that has not been given out
        self._n_calls = 0

    def opening(self) -> list[Chunk]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def is_large(self, delta: Delta) -> bool:
        return self._logprobs and len(self._tokens) + len(delta.tokens) > 32  # held back with the text of a call

    def feed(self, delta: Delta) -> list[Chunk]:
        self._tokens += [t for t in delta.tokens if t.id not in self._model.control_ids]
        pieces: list[str | Call] = [delta.text] if delta.text else []
        if self._reader is not None:
            ends = delta.reply is not None
            pieces = joined(self._reader.feed(delta.text) + (self._reader.flush() if ends else []))
        chunks = [
            self._chunk({"content": piece} if isinstance(piece, str) else {"tool_calls": [self._call(piece)]})
            for piece in pieces
        ]
        if delta.reply is not None:
            reason = "tool_calls" if self._n_calls else delta.reply.finish_reason
            chunks.append({**self._chunk({}), "finish_reason": reason})
        return chunks

    def _chunk(self, delta: dict[str, Any]) -> Chunk:
        logprobs = None
        if self._logprobs and self._tokens:
            logprobs = {"content": chat_logprobs(self._model.table, self._tokens), "refusal": None}
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

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
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
        return {"message": message, "logprobs": logprobs, "finish_reason": chunks[-1]["finish_reason"]}
