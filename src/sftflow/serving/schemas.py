"""A request's body: its bytes, its JSON, and the fields that the routes have in common.

    bytes -> read_body (event loop) -> parse_json -> SamplingBody.read (a thread)

Anything wrong is an ApiError that names the field.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sftflow.serving.errors import ApiError, wrong

MAX_BODY = 2 * 1024 * 1024
MAX_CHOICES = 64
"""replies that one request may ask for: prompts times n"""
MAX_LOGPROBS = 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request) -> bytes:
    """The body. Raises ApiError 413 or 415 without waiting for the rest of it, which the connection throws away."""
    kind = request.headers.get("content-type", "")
    mime, _, parameters = kind.lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters)
    # A page elsewhere may post text/plain or a form here unasked, but not JSON: so nothing else is read as JSON.
    json_like = mime.strip() == "application/json" or (mime.strip().startswith("application/") and "+json" in mime)
    if (kind and not json_like) or (charset and charset.group(1) not in ("utf-8", "utf8", "us-ascii")):
        raise ApiError(415, "send JSON in UTF-8 with Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ApiError(415, "compressed bodies are not read; send it as it is", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY >> 20} MB", code="body_too_large")
    if length.isdecimal() and int(length[:20]) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_large
    return bytes(body)


def parse_json(data: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises ApiError 400: not JSON, not UTF-8, NaN, half a surrogate pair (no tokenizer takes
    it), a key twice in one object (readers differ in which they take), a number of thousands of digits."""

    def no_constant(name: str) -> Any:
        raise _not_json(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _not_json("a key stands twice in one object")
        return found

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=once)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "the body is not text in UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at character {error.pos}") from None
    except ValueError:
        raise _not_json("a number has thousands of digits") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return value


def _not_json(fact: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {fact}", code="invalid_json")


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]  # an empty stop text would end every reply


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class ModelBody(BaseModel):
    """What every route reads. Unknown fields are nobody's business; null means the same as left out."""

    model_config = ConfigDict(strict=True, extra="ignore")
    # Known fields that we do not do: each with the values that ask for nothing.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Check a JSON object. Raises ApiError 400 naming the field."""
        try:
            body = cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise wrong(str(first["loc"][0]), first["msg"]) from None
        for field, nothing in cls.unsupported.items():
            if value.get(field) not in (None, *nothing):
                raise ApiError(400, f"{field} is not supported here", param=field, code="unsupported_parameter")
        return body


class SamplingBody(ModelBody):
    """How replies are drawn, how many, and in which form: what chat and plain completions have in common. Names that
    OpenAI does not have (top_k, min_p, repetition_penalty, ignore_eos) are vLLM's."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logit_bias": ({},),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "structured_outputs": ({},),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": ([],),
        "guided_grammar": (),
        "prompt_logprobs": (),
        "lora": (),
    }

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)
