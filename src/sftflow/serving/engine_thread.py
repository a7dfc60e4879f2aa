"""One thread a model, which keeps the engine's scheduler running, and the line of requests in front of it.

    event loop:  submit -> Generations -> deltas()        the engine's thread:  line -> scheduler.advance() -> deltas

Requests join those that run at any token. The event loop only waits: what a step has brought is handed over to it for
all requests in one call, and a client that leaves takes its work with it. Nothing here polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from sftflow.generation.request import Delta, GenerationRequest
from sftflow.generation.scheduler import Scheduler
from sftflow.serving.errors import ApiError

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant
    from sftflow.generation.sequence import ReplySequence

MAX_RUNNING, MAX_WAITING = 32, 64
PROMPT_TOKENS = 512
"""at most so many tokens of prompts are read between two tokens of the running replies"""
log = logging.getLogger("sftflow.serving")
Piece = Delta | Exception


@dataclass(eq=False)
class Job:
    """One reply of a request.   began: the engine has begun with it."""

    owner: Generations
    index: int
    request: GenerationRequest
    began: bool = False


class Generations:
    """The replies to one HTTP request while they are computed, as the event loop sees them.

    streamed: whether they are wanted in pieces; else each comes as one delta, for less work.
    client: the request, whose body has been read: when its client hangs up, the replies are cancelled. That is a task
    which sleeps until the server says so, and costs nothing meanwhile.
    """

    def __init__(
        self, thread: EngineThread, requests: Sequence[GenerationRequest], streamed: bool, client: Request | None
    ) -> None:
        self.jobs = [Job(self, index, request) for index, request in enumerate(requests)]
        self.streamed, self.cancelled = streamed, False
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
        self._thread = thread
        self._watcher = self.loop.create_task(self._watch(client)) if client is not None else None

    async def _watch(self, client: Request) -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def cancel(self) -> None:
        """Give the replies up; their places are free at the latest after the next token. Those that are over stay."""
        if not self.cancelled:
            self.cancelled = True
            self._thread.leave(self.jobs)
            self.queue.put_nowait(None)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(index of the reply, a piece of it), as they come; the last piece of each has the reply. Ends early where the
        replies were cancelled. Raises what ended one of them. Leaving it cancels those that still run."""
        unfinished = len(self.jobs)
        try:
            while unfinished and (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                unfinished -= item[1].reply is not None
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
            self.cancel()


class EngineThread:
    """One model's thread and the line in front of it.

    max_running: replies that are computed side by side.   max_waiting: those that may stand in line besides.
    ready: whether the model has been proven (see `generation.check_decoder`), so that a request is computed at once.
    broken: what ended the thread, where it was not `close`.   unproven: it was the proof.
    For /metrics, since it began: prompt_tokens, of requests that have begun; generated_tokens, of all replies, finished
    or not; finished, requests by how they ended.
    """

    def __init__(self, assistant: Assistant, *, max_running: int = MAX_RUNNING, max_waiting: int = MAX_WAITING) -> None:
        self.assistant, self.max_waiting = assistant, max_waiting
        self.max_running = assistant.engine.max_running = max_running
        self.prompt_tokens = self.generated_tokens = 0
        self.finished = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self._proven = False
        self.broken: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards _line and _jobs; told of whatever the thread may wait for
        self._line: deque[Job] = deque()
        self._jobs: set[Job] = set()  # all that are not over
        self._scheduler: Scheduler | None = None  # while there is work
        self._thread = threading.Thread(target=self._run, name="sftflow-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._proven and self._thread.is_alive()

    @property
    def running(self) -> int:
        scheduler = self._scheduler
        return scheduler.running if scheduler else 0

    @property
    def waiting(self) -> int:
        scheduler = self._scheduler
        return len(self._line) + (scheduler.waiting if scheduler else 0)

    @property
    def unproven(self) -> bool:
        return self.broken is not None and not self._proven

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError 503 where `n` more would be too many, or nobody is there to compute them."""
        if self._closed:
            raise _stopping()
        if self.broken is not None:
            raise unusable()
        if len(self._jobs) + n > self.max_running + self.max_waiting:
            raise ApiError(503, "too many requests are waiting; try again soon", code="queue_full", Retry_After="5")

    def submit(
        self, requests: Sequence[GenerationRequest], *, streamed: bool = True, client: Request | None = None
    ) -> Generations:
        """Put requests in line, from the event loop. Raises ApiError 503 where there is no room for all of them."""
        with self._changed:
            self.check_room(len(requests))
            made = Generations(self, requests, streamed, client)
            self._jobs.update(made.jobs)
            self._line.extend(made.jobs)
            self._changed.notify()
        return made

    def leave(self, jobs: Sequence[Job]) -> None:
        """Jobs that are cancelled: their places in the line are free now, those in the engine after the next token."""
        with self._changed:
            self._jobs.difference_update(jobs)
            for job in jobs:
                if job in self._line:
                    self._line.remove(job)
                    self.finished["cancelled"] += 1

    def close(self) -> None:
        """End every reply, at the latest after its next token."""
        self._closed = True
        self._end_all(_stopping())

    def _end_all(self, error: Exception) -> int:
        """Everything that waits or runs ends with this error. Returns how many replies those are."""
        with self._changed:
            self._line.clear()
            jobs = list(self._jobs)
            for job in jobs:
                job.owner.cancelled = True
            self._changed.notify()
        self._tell([(job, error) for job in jobs])
        return len(jobs)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            self.assistant.engine.decode_mode(0)
            self._proven = True
            while self._wait():
                try:
                    self._compute()
                except Exception as error:  # a fault of ours, or of the machine: none of them can be saved
                    log.error("generation failed", exc_info=error)
                    self.finished["error"] += self._end_all(error)
        except BaseException as error:
            # Where the proof failed, `serve` ends with it in one line.
            log.log(logging.ERROR if self._proven else logging.DEBUG, "the engine's thread ended", exc_info=error)
            self.broken = error  # from here on nobody gets in line
            self.finished["error"] += self._end_all(unusable())

    def _wait(self) -> bool:
        """Until there is work; False: until the server stops."""
        self._scheduler = None
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._closed)
            return not self._closed

    def _compute(self) -> None:
        """Run a scheduler until nothing is left for it to do; the memory of its keys and values is given back then."""
        with self._changed:
            if not self._line:
                return
            long = self._is_long(self._line[0])
        running: dict[int, Job] = {}
        with self.assistant.engine.scheduler(longest=None if long else 0, prompt_tokens=PROMPT_TOKENS) as scheduler:
            self._scheduler = scheduler
            while not self._closed:
                if gone := [number for number, job in running.items() if job.owner.cancelled]:
                    scheduler.cancel(gone)
                    for number in gone:
                        del running[number]
                    self.finished["cancelled"] += len(gone)
                self._enter(scheduler, running, long)
                if not scheduler.busy:
                    return
                self._report(scheduler.advance(), running)

    def _is_long(self, job: Job) -> bool:
        """Whether its reply may grow beyond the length up to which this model's rows may be computed side by side.
        Such requests and others take turns."""
        return len(job.request.prompt_ids) + job.request.max_new_tokens > self.assistant.engine.length_limit

    def _enter(self, scheduler: Scheduler, running: dict[int, Job], long: bool) -> None:
        """Let the line's head into the scheduler while there is room, in order."""
        refused: list[tuple[Job, Piece]] = []
        with self._changed:
            while self._line and len(running) < self.max_running and self._is_long(self._line[0]) == long:
                job = self._line.popleft()
                try:
                    running[scheduler.submit(job.request, streamed=job.owner.streamed)] = job
                except Exception as error:
                    refused.append((job, error))
        self.finished["error"] += len(refused)
        self._tell(refused)

    def _report(self, sequences: list[ReplySequence], running: dict[int, Job]) -> None:
        """Hand over what a step has brought."""
        brought: list[tuple[Job, Piece]] = []
        for sequence in sequences:
            job = running[sequence.number]
            if not job.began:
                job.began = True
                self.prompt_tokens += len(job.request.prompt_ids)
            self.generated_tokens += sequence.error is None and bool(sequence.ids)
            if sequence.over:
                del running[sequence.number]
                self.finished["error" if sequence.error is not None else str(sequence.finish)] += 1
            if sequence.error is not None:
                brought.append((job, sequence.error))
            else:
                delta = sequence.take()
                if delta.text or delta.tokens or delta.reply is not None:
                    brought.append((job, delta))
        self._tell(brought)

    def _tell(self, brought: list[tuple[Job, Piece]]) -> None:
        """To the event loop, in one call for all jobs: a call each would keep it from everything else."""
        over = [job for job, piece in brought if isinstance(piece, Exception) or piece.reply is not None]
        with self._changed:
            self._jobs.difference_update(over)
        for loop in {job.owner.loop for job, _ in brought}:
            mine = [(job, piece) for job, piece in brought if job.owner.loop is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put_all, mine)


def _put_all(brought: list[tuple[Job, Piece]]) -> None:
    for job, piece in brought:
        job.owner.queue.put_nowait(piece if isinstance(piece, Exception) else (job.index, piece))


def unusable() -> ApiError:
    return ApiError(503, "this model cannot be computed here; the server has to be mended", code="model_unusable")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", Retry_After="5")
