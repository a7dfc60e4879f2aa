"""One thread a model, and the line of requests in front of it.

The engine is not re-entrant, so each model has one worker thread and a bounded line; the event loop only ever waits.
A client that leaves takes its work with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

from fastapi import Request

from sftflow.generate import engine as generation
from sftflow.serve.errors import ApiError

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

MAX_WAITING = 64


@dataclass
class Stats:
    """What a worker has done since it began, for /metrics; read on the event loop.

    finished: requests by how they ended: "stop", "length", "cancelled" or "error".
    """

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Job:
    """One generation: the worker's thread puts deltas in, the event loop takes them out."""

    def __init__(self, request: generation.Request) -> None:
        self.request = request
        self.cancelled = Event()
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[generation.Delta | Exception | None] = asyncio.Queue()

    def put(self, item: generation.Delta | Exception | None) -> None:
        """From the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def cancel(self) -> None:
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()  # if it still waits in line, it never starts
        self._queue.put_nowait(None)

    async def deltas(self, request: Request) -> AsyncGenerator[generation.Delta]:
        """The reply piece by piece; ends early, and ends the work, when the client is gone."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.1)
            self.cancel()

        watcher = asyncio.create_task(watch())
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            watcher.cancel()
            self.cancel()


class Worker:
    """One model's thread and the line in front of it.

    slots: replies that run side by side.   max_waiting: requests that may stand in line besides.
    ready: whether the model has been proven and the first request would be computed at once.
    """

    def __init__(self, assistant: Assistant, *, slots: int = 32, max_waiting: int = MAX_WAITING) -> None:
        self.assistant, self.max_waiting = assistant, max_waiting
        self.stats = Stats()
        self.ready = True
        self.jobs: set[Job] = set()  # the one that runs and those that wait
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sftflow-engine")

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError 503 where the line does not take `n` more."""
        if len(self.jobs) + n > self.max_waiting + 1:
            raise ApiError(503, "too many requests are waiting; try again soon", code="queue_full", Retry_After="5")

    def submit(self, request: generation.Request) -> Job:
        """Put a request in line. Raises ApiError 503 where the line is full."""
        self.check_room()
        job = Job(request)
        self.jobs.add(job)
        job.future = self._pool.submit(self._work, job)
        job.future.add_done_callback(lambda _: self.jobs.discard(job))
        return job

    def _work(self, job: Job) -> None:
        try:
            with contextlib.closing(self.assistant.engine.stream(job.request)) as stream:  # type: ignore[type-var]
                for delta in stream:
                    if job.cancelled.is_set():
                        return
                    job.put(delta)
        except Exception as error:
            job.put(error)
        finally:
            job.put(None)

    def close(self) -> None:
        """End every reply, at the latest after its next token."""
        for job in list(self.jobs):
            job.put(ApiError(503, "the server is stopping", code="stopping"))
            job.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
