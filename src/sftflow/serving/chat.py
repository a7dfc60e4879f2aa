"""`/v1/chat/completions`: what is asked of the engine, and replies in the OpenAI shape."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from sftflow.chat.thoughts import Piece, ThoughtReader
from sftflow.chat.tool_parser import Call, CallReader, joined
from sftflow.generation.request import Delta
from sftflow.serving.errors import wrong
from sftflow.serving.logprobs import ReplyLogprobs, joined_logprobs
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.prompt import chat_prompt, read_messages, requests_for
from sftflow.serving.responses import Chunk, ResponseShape
from sftflow.serving.schemas import ChatBody
from sftflow.serving.structured import grammar_for

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def chat_response(model: ServedModel, body: ChatBody) -> ResponseShape:
    """Reads the prompt, which takes its time. Raises ApiError 400."""
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "it needs logprobs: true")
    prompt = chat_prompt(model, body)
    limit = body.max_completion_tokens or body.max_tokens  # an upper bound: what fits is less
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    thoughts, begun = model.thoughts, ""
    if thoughts is not None:
        continued = read_messages(body.messages[-1:]).messages[0].text if body.continue_final_message else ""
        begun = thoughts.begun(prompt.text, continued)
    shown = thoughts.shown(model.assistant.renderer) if thoughts else ()
    ids = prompt.ids.tolist()
    more = {"logprobs": logprobs, "shown": shown, "grammar": grammar_for(model, body, prompt.text, begun)}
    requests = requests_for(model.assistant, body, ids, limit, **more)
    choices = [ChatChoice(model, body, begun) for _ in requests]
    return ResponseShape(model=model, body=body, n_prompt=len(ids), requests=requests, choices=choices)


class ChatChoice:
    """One reply: each chunk is the `delta` of a message, with its log-probabilities."""

    id_prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, body: ChatBody, begun: str = "") -> None:
        """begun: what of the reply's thoughts its prompt has, see `ThoughtMarks`."""
        marks, offered, decoder = model.thoughts, body.offered, model.assistant.engine.reply_decoder
        self._thoughts = ThoughtReader(marks, begun) if marks else None
        self._calls = CallReader(model.calls, offered) if offered and model.calls is not None else None
        shown = marks.shown(model.assistant.renderer) if marks else ()
        text = decoder.reply_text(shown=shown)
        self._logprobs = ReplyLogprobs(model.table, model.control_ids, text) if body.logprobs else None
        self._n_text = self._n_calls = 0
        self._said: list[int] = []  # where in the reply's text the characters are that are read for calls
        self._one_call = body.parallel_tool_calls is False
        self._named = bool(body.forced)

    def opening(self) -> list[Chunk]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def is_large(self, delta: Delta) -> bool:
        held = 0 if self._logprobs is None else len(self._logprobs) + len(delta.tokens)
        return held > 32  # held back with the text of a call

    def feed(self, delta: Delta) -> list[Chunk]:
        final = delta.reply is not None
        if self._logprobs is not None:
            self._logprobs.add(delta.tokens, final=final)
        chunks = [self._chunk(piece) for piece in self._pieces(delta.text, final)]
        if delta.reply is not None:
            # As OpenAI has it: that the one tool that had to be called was called says nothing new. What was cut off
            # says so: a further call may have been begun.
            reason: str = delta.reply.finish_reason
            if reason == "stop" and self._n_calls and not self._named:
                reason = "tool_calls"
            chunks.append({**self._chunk({}, final=True), "finish_reason": reason})
        return chunks

    def _pieces(self, text: str, final: bool) -> Iterator[dict[str, Any]]:
        """The deltas of a message that a piece of the reply's text makes certain."""
        if self._thoughts is None:
            pieces = [Piece("said", text, self._n_text)] if text else []
            self._n_text += len(text)
        else:
            pieces = self._thoughts.feed(text) + (self._thoughts.flush() if final else [])
        for piece in pieces:
            if piece.kind == "thought":
                yield from self._called([], final=True)  # no call goes on behind thoughts
                self._read("reasoning_content", *places(piece))
                yield {"reasoning_content": piece.text}
            elif self._calls is None:
                self._read("content", *places(piece))
                yield {"content": piece.text}
            else:
                yield from self._called([piece], final=False)
        if final:
            yield from self._called([], final=True)

    def _called(self, said: Sequence[Piece], final: bool) -> Iterator[dict[str, Any]]:
        """What was said, with its tool calls read."""
        reader = self._calls
        if reader is None:
            return
        self._said += [i for piece in said for i in places(piece)]
        at, n_texts = reader.n_read, len(reader.texts)
        found = reader.feed("".join(piece.text for piece in said)) + (reader.flush() if final else [])
        spans = [*reader.texts[n_texts:], (reader.n_read, reader.n_read)]
        for piece in joined(found):
            start, end = spans[0]
            self._read("tool_calls", *self._said[at:start])
            if isinstance(piece, str):
                end = start + len(piece)
                spans = [span for span in spans if span[1] > end] or spans[-1:]
                self._read("content", *self._said[start:end])
            if isinstance(piece, str):
                yield {"content": piece}
            elif not (self._one_call and self._n_calls):
                yield {"tool_calls": [self._call(piece)]}
            at = end if isinstance(piece, str) else start
        self._read("tool_calls", *self._said[at : reader.n_read])

    def _read(self, kind: str, *characters: int) -> None:
        """Tell the log-probabilities what these characters of the reply's text are."""
        if self._logprobs is not None:
            for i in characters:
                self._logprobs.read(kind, i, i + 1)

    def _chunk(self, delta: dict[str, Any], *, final: bool = False) -> Chunk:
        logprobs = self._logprobs.take(final=final) if self._logprobs is not None else None
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
        thoughts = "".join(c["delta"].get("reasoning_content", "") for c in chunks)
        calls = [call for c in chunks for call in c["delta"].get("tool_calls", [])]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._thoughts is not None:
            message["reasoning_content"] = thoughts or None
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        logprobs = None if self._logprobs is None else joined_logprobs(c["logprobs"] for c in chunks)
        return {"message": message, "logprobs": logprobs, "finish_reason": chunks[-1]["finish_reason"]}


def places(piece: Piece) -> range:
    """Where its characters are in the reply's text."""
    return range(piece.at, piece.at + len(piece.text) if piece.at >= 0 else piece.at)
