"""From the engine's deltas to an HTTP answer: one JSON object, or a stream of server-sent events.

    Generations.deltas -> (index, delta) -> that reply's ChoiceShape.feed -> chunks -> events, or joined: one object

An answer that is not streamed is made of the chunks that a stream would have sent, so that the two cannot differ.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect

from sftflow.generation.request import Delta, GenerationRequest, Reply
from sftflow.serving.engine_thread import Generations
from sftflow.serving.errors import internal
from sftflow.serving.metrics import Metrics
from sftflow.serving.middleware import Record
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.schemas import SamplingBody

Chunk = dict[str, Any]
"""the fields of one choice of a streamed object, without its index"""
SLICE = 32
"""elements of a list that are encoded at once; with 20 likeliest tokens each they take a millisecond"""
PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# ASCII only: readers that split lines as Python does would break events at U+2028 and its like.
EVENT = json.JSONEncoder()


class ChoiceShape(Protocol):
    """Gives one reply the shape of a choice in the OpenAI API, piece by piece.

    id_prefix, whole_object, piece_object: of the `id` and `object` of the answer, and of a stream's pieces.
    """

    id_prefix: str
    whole_object: str
    piece_object: str

    def opening(self) -> list[Chunk]:
        """What a stream says before the first token."""
        ...

    def is_large(self, delta: Delta) -> bool:
        """Whether `feed` may take long, so that it belongs into a thread."""
        ...

    def feed(self, delta: Delta) -> list[Chunk]:
        """The chunks of a piece; the last one says why the reply ended."""
        ...

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The choice of an answer that is not streamed, from all its chunks."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResponseShape:
    """What one HTTP request asks of the engine, and what its answer will look like.

    choices: one for each of `requests`.   n_prompt: tokens of its prompts.
    """

    model: ServedModel
    body: SamplingBody
    n_prompt: int
    requests: Sequence[GenerationRequest]
    choices: Sequence[ChoiceShape]


class Responder:
    """Makes one answer. Raises, in `whole`, ApiError, or ClientDisconnect where nobody reads it any more."""

    def __init__(self, shape: ResponseShape, generations: Generations, record: Record, metrics: Metrics) -> None:
        self.shape, self.generations, self.record, self.metrics = shape, generations, record, metrics
        identity = f"{shape.choices[0].id_prefix}-{uuid.uuid4().hex}"
        self._head = {"id": identity, "created": int(time.time()), "model": shape.model.name}
        self._replies: dict[int, Reply] = {}

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(index, piece) of all replies. Raises ClientDisconnect where the client left before all had ended."""
        first = self.generations.streamed  # else the first piece is the last one, and tells nothing of the first token
        try:
            async with aclosing(self.generations.deltas()) as pieces:
                async for index, delta in pieces:
                    if first:
                        first = False
                        self.metrics.first_token(self.shape.model.name, time.perf_counter() - self.record.began)
                    if delta.reply is not None:
                        self._replies[index] = delta.reply
                        self.record.n_generated += len(delta.reply.ids)
                    yield index, delta
        except Exception as error:
            raise internal(error) from None
        if len(self._replies) < len(self.shape.requests):
            raise ClientDisconnect

    def _usage(self) -> dict[str, int]:
        n_prompt, n_completion = self.shape.n_prompt, sum(len(r.ids) for r in self._replies.values())
        return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}

    async def whole(self) -> bytes:
        """The answer to a request that does not stream, as JSON."""
        async with aclosing(self._deltas()) as deltas:
            pieces = [piece async for piece in deltas]

        def encode() -> bytes:
            head = PLAIN.encode({**self._head, "object": self.shape.choices[0].whole_object})
            out = [head[:-1].encode(), b',"choices":[']
            for index, delta in sorted(pieces, key=lambda piece: piece[0]):  # each reply is one delta
                choice = self.shape.choices[index]  # one after the other: a choice takes more memory than its JSON
                out.append(b"," if index else b"")
                out += [text.encode() for text in slices({"index": index, **choice.whole(choice.feed(delta))})]
            return b"".join([*out, b'],"usage":', PLAIN.encode(self._usage()).encode(), b"}"])

        return await asyncio.to_thread(encode)  # log-probabilities of long prompts take their time

    async def events(self) -> AsyncIterator[str]:
        """The OpenAI event stream. An error in the middle is an event of its own, on which the clients raise; the
        status line is long gone."""
        head = {**self._head, "object": self.shape.choices[0].piece_object}
        before = f'data: {EVENT.encode(head)[:-1]}, "choices": ['
        after = f"]{', ' + EVENT.encode({'usage': None})[1:-1] if self.shape.body.include_usage else ''}}}\n\n"

        def event(index: int, chunk: Chunk, *, large: bool = False) -> str:
            choice = {"index": index, **chunk}
            return f"{before}{''.join(slices(choice, EVENT)) if large else EVENT.encode(choice)}{after}"

        def shaped(index: int, delta: Delta, large: bool) -> list[str]:
            return [event(index, chunk, large=large) for chunk in self.shape.choices[index].feed(delta)]

        try:
            for index, choice in enumerate(self.shape.choices):
                for chunk in choice.opening():
                    yield event(index, chunk)
            async with aclosing(self._deltas()) as deltas:
                async for index, delta in deltas:
                    large = self.shape.choices[index].is_large(delta)
                    work = functools.partial(shaped, index, delta, large)
                    for text in await asyncio.to_thread(work) if large else work():
                        yield text
        except ClientDisconnect:
            return
        except Exception as error:
            yield f"data: {EVENT.encode(internal(error).body)}\n\n"
            return
        if self.shape.body.include_usage:
            yield f"data: {EVENT.encode({**head, 'choices': [], 'usage': self._usage()})}\n\n"
        yield "data: [DONE]\n\n"


def slices(value: Any, encoder: json.JSONEncoder = PLAIN) -> Iterator[str]:
    """Its JSON, the same as at once, in pieces: one `json.dumps` of megabytes would keep the event loop's thread
    waiting to its end, for Python's C encoder lets no other thread run.

    >>> "|".join(slices({"a": [1, 2], "b": {}}))
    '{|"a":|[|1,2|]|,|"b":|{}|}'
    """
    if isinstance(value, dict) and value:
        yield "{"
        for number, (key, inner) in enumerate(value.items()):
            if number:
                yield encoder.item_separator
            yield encoder.encode(key) + encoder.key_separator
            yield from slices(inner, encoder)
        yield "}"
    elif isinstance(value, list) and value:
        yield "["
        for start in range(0, len(value), SLICE):
            yield (encoder.item_separator if start else "") + encoder.encode(value[start : start + SLICE])[1:-1]
        yield "]"
    else:
        yield encoder.encode(value)
