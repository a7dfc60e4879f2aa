"""One thread a model, which keeps one session of the engine running, and the line of requests in front of it.

    event loop:  submit -> Job -> job.deltas()            the engine's thread:  line -> session.advance() -> deltas

Requests join those that run at any token. The event loop only waits: what a step has brought is handed over to it for
all jobs in one call, and a client that leaves takes its work with it. Nothing here polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from sftflow.generation.request import Delta, GenerationRequest
from sftflow.generation.scheduler import Scheduler
from sftflow.serving.errors import ApiError

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant
    from sftflow.generation.sequence import ReplySequence

SLOTS, MAX_WAITING = 32, 64
PROMPT_TOKENS = 512
"""of prompts, at most so many are read between two tokens of the running replies"""
log = logging.getLogger("sftflow.serving")
StreamItem = Delta | Exception | None


@dataclass
class Stats:
    """What a worker has done since it began, for /metrics; written by the engine's thread, read by anyone.

    prompt_tokens: of requests that have begun.   generated_tokens: of all replies, finished or not.
    finished: requests by how they ended: "stop", "length", "cancelled" or "error".
    """

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0))


class Job:
    """One generation, as the event loop sees it."""

    def __init__(self, worker: Worker, request: GenerationRequest, streamed: bool) -> None:
        self.request, self.streamed = request, streamed
        self.cancelled = False
        self.began = False  # the engine has taken it out of its line
        self.loop = asyncio.get_running_loop()
        self._worker = worker
        self._queue: asyncio.Queue[StreamItem] = asyncio.Queue()

    def put(self, item: StreamItem) -> None:
        """On the event loop."""
        self._queue.put_nowait(item)

    def cancel(self) -> None:
        """Give the job up; its slot is free at the latest after the next token. Nothing where it is over."""
        if not self.cancelled:
            self.cancelled = True
            self._worker.leave(self)
            self._queue.put_nowait(None)

    async def deltas(self, request: Request | None = None) -> AsyncGenerator[Delta]:
        """The reply piece by piece, ending with the delta that has the reply; without one where the job was cancelled.
        Raises what ended it otherwise. Leaving it early cancels the job.

        request: the client's, whose body has been read: when it hangs up, the job is cancelled. That is a task which
        sleeps until the server says so, and costs nothing meanwhile. A job that is not streamed has one delta.
        """

        async def watch(request: Request) -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        watcher = asyncio.create_task(watch(request)) if request is not None else None
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.reply is not None:
                    return
        finally:
            if watcher is not None:
                watcher.cancel()
            self.cancel()


class Worker:
    """One model's thread and the line in front of it.

    slots: replies that run side by side.   max_waiting: requests that may stand in line besides.
    ready: whether the model has been proven (see `generate.prove`), so that a request is computed at once.
    broken: what ended the thread, where it was not `close`.   unproven: it was the proof.
    """

    def __init__(self, assistant: Assistant, *, slots: int = SLOTS, max_waiting: int = MAX_WAITING) -> None:
        self.assistant, self.max_waiting = assistant, max_waiting
        self.slots = assistant.engine.max_running = slots
        self.stats = Stats()
        self._proven = False
        self.broken: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards _line and _jobs; told of whatever the thread may wait for
        self._line: deque[Job] = deque()
        self._jobs: set[Job] = set()  # all that are not over
        self._thread = threading.Thread(target=self._work, name="sftflow-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._proven and self._thread.is_alive()

    @property
    def unproven(self) -> bool:
        return self.broken is not None and not self._proven

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError 503 where `n` more would be too many, or nobody is there to compute them."""
        if self._closed:
            raise _stopping()
        if self.broken is not None:
            raise unusable()
        if len(self._jobs) + n > self.slots + self.max_waiting:
            raise ApiError(503, "too many requests are waiting; try again soon", code="queue_full", Retry_After="5")

    def submit(self, request: GenerationRequest, *, streamed: bool = True) -> Job:
        """Put a request in line, from the event loop. Raises ApiError 503 where the line is full.

        streamed: whether the reply is wanted in pieces; else it comes as one delta, for less work.
        """
        job = Job(self, request, streamed)
        with self._changed:
            self.check_room()
            self._jobs.add(job)
            self._line.append(job)
            self.stats.waiting += 1
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """A job that is cancelled: its place in the line is free now, its slot after the next token."""
        with self._changed:
            self._jobs.discard(job)
            if job in self._line:
                self._line.remove(job)
                self.stats.waiting -= 1
                self.stats.finished["cancelled"] += 1

    def close(self) -> None:
        """End every reply, at the latest after its next token."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                with contextlib.suppress(RuntimeError):  # its loop is closed: nobody listens any more
                    job.loop.call_soon_threadsafe(job.put, _stopping())
                job.cancelled = True
            self._changed.notify()

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        try:
            self.assistant.engine.decode_mode(0)
            self._proven = True
            self._run()
        except BaseException as error:
            # Where the proof failed, `serve` ends with it in one line.
            log.log(logging.ERROR if self._proven else logging.DEBUG, "the engine's thread ended", exc_info=error)
            with self._changed:
                self.broken = error  # from here on nobody gets in line
                self._line.clear()
                jobs = list(self._jobs)
            self.stats.waiting = self.stats.running = 0
            self.stats.finished["error"] += len(jobs)
            self._tell([(job, unusable()) for job in jobs])

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
            if self._closed:
                return
            try:
                self._session()
            except Exception as error:  # a fault of ours, or of the machine: none of them can be saved
                log.error("generation failed", exc_info=error)
                with self._changed:
                    self._line.clear()
                    jobs = list(self._jobs)
                self.stats.finished["error"] += len(jobs)
                self._tell([(job, error) for job in jobs])

    def _session(self) -> None:
        """Run a session until nothing is left for it to do; what it remembers is given back then."""
        engine = self.assistant.engine
        with self._changed:
            if not self._line:
                return
            long = self._is_long(self._line[0])
        running: dict[int, Job] = {}
        longest = None if long else 0
        with (
            engine.scheduler(longest=longest, prompt_tokens=PROMPT_TOKENS) as session,
            contextlib.ExitStack() as leaving,
        ):
            leaving.callback(self._count, session, idle=True)
            while not self._closed:
                if gone := [n for n, job in running.items() if job.cancelled]:
                    session.cancel(gone)
                    for number in gone:
                        del running[number]
                    self.stats.finished["cancelled"] += len(gone)
                refused = self._enter(session, running, long)
                self.stats.finished["error"] += len(refused)
                self._tell(refused)
                if not session.busy:
                    return
                self._report(session.advance(), running)
                self._count(session)

    def _is_long(self, job: Job) -> bool:
        """Whether it may grow beyond the length up to which this model's rows may be computed side by side. Such
        requests and others take turns."""
        engine = self.assistant.engine
        return len(job.request.prompt_ids) + job.request.max_new_tokens > engine.length_limit

    def _enter(self, session: Scheduler, running: dict[int, Job], long: bool) -> list[tuple[Job, StreamItem]]:
        """Let the line's head into the session while there are slots, in order."""
        refused: list[tuple[Job, StreamItem]] = []
        with self._changed:
            while self._line and len(running) < self.slots and self._is_long(self._line[0]) == long:
                job = self._line.popleft()
                try:
                    running[session.submit(job.request, streamed=job.streamed)] = job
                except Exception as error:
                    refused.append((job, error))
        return refused

    def _report(self, drafts: list[ReplySequence], running: dict[int, Job]) -> None:
        """Hand over what a step has brought."""
        items: list[tuple[Job, StreamItem]] = []
        for draft in drafts:
            job = running[draft.number]
            if not job.began:
                job.began = True
                self.stats.prompt_tokens += len(draft.request.prompt_ids)
            self.stats.generated_tokens += draft.error is None and bool(draft.ids)
            if draft.over:
                del running[draft.number]
                self.stats.finished["error" if draft.error is not None else str(draft.finish)] += 1
            if draft.error is not None:
                items.append((job, draft.error))
            elif job.streamed:
                delta = draft.take()
                if delta.text or delta.tokens or delta.reply is not None:
                    items.append((job, delta))
            elif draft.finish is not None:
                reply = draft.reply()
                items.append((job, Delta(reply.text, draft.finish, reply, reply.logprobs)))
        self._tell(items)

    def _tell(self, items: list[tuple[Job, StreamItem]]) -> None:
        """To the event loop, in one call for all jobs: a call each would keep it from everything else."""
        self._over([job for job, item in items if isinstance(item, Exception) or (item and item.reply is not None)])
        for loop in {job.loop for job, _ in items}:
            mine = [(job, item) for job, item in items if job.loop is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put_all, mine)

    def _over(self, jobs: list[Job]) -> None:
        with self._changed:
            for job in jobs:
                self._jobs.discard(job)

    def _count(self, session: Scheduler, *, idle: bool = False) -> None:
        self.stats.running = 0 if idle else session.running
        self.stats.waiting = len(self._line) + (0 if idle else session.waiting)


def _put_all(items: list[tuple[Job, StreamItem]]) -> None:
    for job, item in items:
        job.put(item)


def unusable() -> ApiError:
    return ApiError(503, "this model cannot be computed here; the server has to be mended", code="model_unusable")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", Retry_After="5")
