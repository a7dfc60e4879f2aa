"""One thread a model, and the line of requests in front of it.

The engine is not re-entrant, so each model has one worker thread and a bounded line; the event loop only ever waits.
A client that leaves takes its work with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

from fastapi import Request

from sftflow.generate import engine as generation
from sftflow.serve.wire import ApiError

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

MAX_WAITING = 64


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
    """One model's thread and the line in front of it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.jobs: set[Job] = set()  # the one that runs and those that wait
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sftflow-engine")

    def check_room(self) -> None:
        if len(self.jobs) > MAX_WAITING:
            raise ApiError(429, "too many requests are waiting; try again soon", code="queue_full", Retry_After="5")

    def submit(self, request: generation.Request) -> Job:
        """Put a request in line. Raises ApiError 429 where more than MAX_WAITING wait already."""
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
