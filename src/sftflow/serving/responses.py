"""From submitted jobs to an answer: one JSON object, or a stream of server-sent events.

jobs -> merged (index, delta) -> each reply's choice (chat, completions) -> events, or whole
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sftflow.generation.request import Delta, GenerationRequest, Reply
from sftflow.serving.engine_thread import Job
from sftflow.serving.errors import internal
from sftflow.serving.json_stream import EVENT, slices, to_json
from sftflow.serving.metrics import Metrics
from sftflow.serving.middleware import Record
from sftflow.serving.model_entry import Served


class Choice(Protocol):
    """One reply on its way into its shape."""

    def opening(self) -> list[dict[str, Any]]: ...

    def is_large(self, delta: Delta) -> bool:
        """Whether `feed` may take long, so that it belongs into a thread."""
        ...

    def feed(self, delta: Delta) -> list[dict[str, Any]]: ...

    def whole(self, chunks: Sequence[dict[str, Any]]) -> dict[str, Any]: ...


class Answer(Protocol):
    """What one request asks of the engine, and the shape of its answer."""

    id_prefix: str
    whole_object: str
    piece_object: str
    served: Served
    requests: list[GenerationRequest]
    n_prompt: int

    def choice(self, index: int) -> Choice: ...


class ClientDisconnected(Exception):
    """The client has left; nobody reads an answer."""


async def merged(jobs: Sequence[Job], request: Request | None = None) -> AsyncGenerator[tuple[int, Delta]]:
    """(number of the job, a piece of its reply), as they come. Closing it gives up what still runs.

    request: the client's, whose body has been read: when it hangs up, all jobs are given up.
    """
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def pump(number: int, job: Job) -> None:
        try:
            async with aclosing(job.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait((number, delta))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    async def watch(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            job.cancel()

    tasks = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    if request is not None:
        tasks.append(asyncio.create_task(watch(request)))
    ended = 0
    try:
        while ended < len(jobs):
            number, item = await queue.get()
            if item is None:
                ended += 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for job in jobs:
            job.cancel()  # a task that has not begun would not
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Answering:
    """One answer being made."""

    def __init__(self, answer: Answer, jobs: Sequence[Job], record: Record, metrics: Metrics) -> None:
        self.answer, self.jobs, self.record, self.metrics = answer, jobs, record, metrics
        self.choices = [answer.choice(i) for i in range(len(jobs))]
        self.head = {
            "id": f"{answer.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": answer.served.name,
        }
        self._replies: dict[int, Reply] = {}

    async def _deltas(self, request: Request | None) -> AsyncGenerator[tuple[int, Delta]]:
        """(index, piece) of all replies. Raises ClientDisconnected where the client left before all had ended."""
        first = self.jobs[0].streamed  # else the first piece is the last one, and tells nothing of the first token
        async with aclosing(merged(self.jobs, request)) as pieces:
            async for index, delta in pieces:
                if first:
                    first = False
                    self.metrics.first_token(self.answer.served.name, time.perf_counter() - self.record.began)
                if delta.reply is not None:
                    self._replies[index] = delta.reply
                    self.record.n_generated += len(delta.reply.ids)
                yield index, delta
        if len(self._replies) < len(self.jobs):
            raise ClientDisconnected

    def _usage(self) -> dict[str, int]:
        n_prompt, n_completion = self.answer.n_prompt, sum(len(r.ids) for r in self._replies.values())
        return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}

    async def whole(self, request: Request) -> bytes:
        """The answer to a request that does not stream, as JSON. Raises ApiError or ClientDisconnected."""
        try:
            async with aclosing(self._deltas(request)) as deltas:
                pieces = [piece async for piece in deltas]
        except ClientDisconnected:
            raise
        except Exception as error:
            raise internal(error) from None
        return await asyncio.to_thread(self._json, pieces)  # log-probabilities of long prompts take their time

    def _json(self, pieces: Sequence[tuple[int, Delta]]) -> bytes:
        deltas: list[list[Delta]] = [[] for _ in self.choices]
        for index, delta in pieces:
            deltas[index].append(delta)
        frame = to_json({**self.head, "object": self.answer.whole_object, "choices": [], "usage": self._usage()})
        before, _, after = frame.rpartition(b'"choices":[]')  # the last one: what precedes it has the model's name
        out = [before, b'"choices":[']
        for index, choice in enumerate(self.choices):  # one after the other: the shape takes more memory than its JSON
            chunks = [chunk for delta in deltas[index] for chunk in choice.feed(delta)]
            out.append(b"," if index else b"")
            out += [text.encode() for text in slices({"index": index, **choice.whole(chunks)})]
        return b"".join([*out, b"]", after])

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The OpenAI event stream. An error in the middle is an event of its own, on which the clients raise; the
        status line is long gone. (Whoever sends the events closes this when the client hangs up.)"""
        head = {**self.head, "object": self.answer.piece_object}
        no_usage = {"usage": None} if include_usage else {}

        def event(data: dict[str, Any]) -> str:
            return f"data: {EVENT.encode(data)}\n\n"

        def piece(index: int, chunk: dict[str, Any]) -> str:
            return event({**head, "choices": [{"index": index, **chunk}], **no_usage})

        def large(index: int, delta: Delta) -> list[str]:
            """The events of a piece that takes long, made in a thread."""
            before, _, after = piece(index, {"logprobs": None}).rpartition('"logprobs": null')
            out = []
            for chunk in self.choices[index].feed(delta):
                inside = "".join(slices(chunk, EVENT))[1:-1]
                out.append(before + inside + after)
            return out

        try:
            for index, choice in enumerate(self.choices):
                for chunk in choice.opening():
                    yield piece(index, chunk)
            async with aclosing(self._deltas(None)) as deltas:
                async for index, delta in deltas:
                    if self.choices[index].is_large(delta):
                        for text in await asyncio.to_thread(large, index, delta):
                            yield text
                        continue
                    for chunk in self.choices[index].feed(delta):
                        yield piece(index, chunk)
        except ClientDisconnected:
            return
        except Exception as error:
            yield event(internal(error).body)
            return
        if include_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends the events of an answer, and gives up its jobs when the client hangs up: before the first event, too."""

    def __init__(self, made: Answering, include_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(made.events(include_usage), media_type="text/event-stream", headers=headers)
        self._jobs = made.jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()
