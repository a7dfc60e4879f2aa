"""What goes over the wire: request bodies and their checks, errors, replies whole and in pieces, in the OpenAI shapes.

    bytes -> read_json -> ChatBody -> generation_request -> engine -> completion, or events

What a client gets wrong is an ApiError, and names the field.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sftflow.chat.schema import parse_row
from sftflow.errors import ContextError, SftflowError
from sftflow.generate import engine as generation
from sftflow.serve.terminal import own_sampling

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

MAX_BODY = 2 * 1024 * 1024
# Known fields of the OpenAI shape that we do not do: each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
log = logging.getLogger("sftflow.serve")


class ApiError(Exception):
    """An answer in the OpenAI error shape: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]  # an empty stop text would end every reply


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class RenderBody(BaseModel):
    """POST /v1/render."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str
    messages: list[Any] = Field(min_length=1)

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Check a JSON object. Raises ApiError 400 naming the field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            param = str(first["loc"][0])
            raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


class ChatBody(RenderBody):
    """POST /v1/chat/completions: what we read of the OpenAI shape; null means the same as left out."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """As `RenderBody.read`, and refuse what is UNSUPPORTED."""
        body = super().read(value)
        for field, nothing in UNSUPPORTED.items():
            if value.get(field) not in nothing:
                raise ApiError(400, f"{field} is not supported here", param=field, code="unsupported_parameter")
        return body


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 400 or 413."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY:
            body += chunk
        elif size > 16 * MAX_BODY:
            break
        # else: read on and throw away, for a client that is still writing would not see our answer
    if size > MAX_BODY:
        raise ApiError(413, "the body is larger than 2 MB", code="body_too_large")

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no tokenizer takes it
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON in UTF-8", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return value


def prompt_ids(assistant: Assistant, messages: Sequence[Any]) -> tuple[int, ...]:
    """OpenAI messages -> the exact ids that the model is given. Raises ApiError 400."""
    raw = []
    for message in messages:
        if isinstance(message, dict):  # clients send back what they got, with its empty fields (refusal: null ...)
            message = {k: v for k, v in message.items() if k == "content" or (v is not None and v != [])}
        raw.append(message)
    try:
        ids = assistant.renderer.render(parse_row({"messages": raw}, "request"), reply=True).ids.tolist()
    except SftflowError as error:
        param = error.place.removeprefix("request").lstrip(".") or "messages"
        message = f"{param}: {error.fact}" + (f"; {error.remedy}" if error.remedy else "")
        raise ApiError(400, message, param=param, code="invalid_messages") from None
    if len(ids) >= assistant.engine.context:
        raise _too_long(len(ids), assistant.engine.context)
    return tuple(ids)


def _too_long(n_prompt: int, context: int) -> ApiError:
    message = f"the messages are {n_prompt} tokens, the model's context is {context}; shorten them"
    return ApiError(400, message, param="messages", code="context_length_exceeded")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the decoded prompt. A character that several tokens share stands with
    the last of them, and the others are empty."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    before: list[int] = []  # the token in front, for some tokenizers drop the leading space of what they decode
    pending: list[int] = []
    for number, token in enumerate(ids):
        pending.append(token)
        text = decode(before + pending)[len(decode(before)) :]
        if text.endswith("\ufffd") and len(pending) < 4 and number + 1 < len(ids):
            texts.append("")
        else:
            texts.append(text)
            before, pending = pending, []
    return texts


def generation_request(assistant: Assistant, body: ChatBody) -> generation.Request:
    """What the engine is asked for: the body's own sampling, else the checkpoint's. Raises ApiError 400."""
    ids = prompt_ids(assistant, body.messages)
    own = own_sampling(assistant)
    temperature = own["temperature"] if body.temperature is None else body.temperature
    top_p = own["top_p"] if body.top_p is None else body.top_p
    limit = body.max_completion_tokens or body.max_tokens or assistant.engine.context
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return generation.Request(
        prompt_ids=ids,
        max_new_tokens=min(limit, assistant.engine.context - len(ids)),
        temperature=temperature if temperature >= 1e-4 else 0.0,  # the limit of ever smaller ones, without overflow
        top_p=max(top_p, 1e-6),
        top_k=max(own["top_k"] if body.top_k is None else body.top_k, 0),  # -1 is vLLM's "off"
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_texts=tuple(stop),
    )


def _usage(reply: generation.Reply) -> dict[str, int]:
    n_prompt, n_completion = reply.n_prompt, len(reply.ids)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def completion(reply: generation.Reply, head: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that does not stream. head: {"id", "created", "model"}."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)}


def internal(error: Exception) -> ApiError:
    """What a client may know of an engine failure; the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, error.fact, param="messages", code="context_length_exceeded")
    log.error("generation failed", exc_info=error)
    return ApiError(500, "the generation failed; the server's log says why", code="generation_failed")


async def events(
    deltas: AsyncGenerator[generation.Delta], head: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """The OpenAI event stream of one reply. head: as in `completion`."""
    head = {**head, "object": "chat.completion.chunk"}

    def event(data: dict[str, Any]) -> str:
        # ASCII only: readers that split lines as Python does would break events at U+2028 and its like.
        return f"data: {json.dumps(data)}\n\n"

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.text:
                    yield chunk({"content": delta.text})
                if delta.reply is not None:
                    yield chunk({}, delta.reply.finish_reason)
                    if include_usage:
                        yield event({**head, "choices": [], "usage": _usage(delta.reply)})
                    yield "data: [DONE]\n\n"
    except Exception as error:  # the status line is long gone; the OpenAI clients raise on this event
        yield event(internal(error).body)
