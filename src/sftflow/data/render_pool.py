"""Rendering a block of rows, here or in a process of its own.

The parent sends a Job, then blocks; each is answered by a Block. Only this package's own objects travel, between a
parent and the children it started.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.columns import Columned
from sftflow.chat.files.names import Places
from sftflow.chat.plain_text import PlainText
from sftflow.chat.render import Renderer, RendererSpec
from sftflow.chat.schema import Conversation, conversation_of
from sftflow.chat.verify import Checks, add_checks, checks, verify, verify_text
from sftflow.data.store import NO_SPANS, ROW, SPAN, spans_of
from sftflow.data.truncate import first_tokens, fit_to_length
from sftflow.fingerprint import row_digest
from sftflow.foundation.errors import DataError, FormatError, MaskError, RunError, SchemaError, SftflowError

NumberedRow = tuple[int, Any]
"""(number in the source, a line's bytes, a parsed row, either Columned, or a Conversation)"""
Question = tuple[list[NumberedRow], int, Places]
"""(a block, how many of its rows are verified, where they stand)"""


@dataclass(frozen=True)
class Job:
    """How every block of a source is rendered. prefix: the source's name, as errors shall name it."""

    spec: RendererSpec
    prefix: str
    max_length: int
    overlong: str
    on_bad_row: str


@dataclass
class Counts:
    """What became of rows. cut: those shortened, of which cut_tokens within a turn.   ignored: how many had each key
    that nothing was made of.   invariants: how often each was checked and failed, and the first failure."""

    seen: int = 0
    cut: int = 0
    cut_tokens: int = 0
    expanded: int = 0
    pretokenized: int = 0
    boundary_splits: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    invariants: Checks = field(default_factory=dict)

    def add(self, more: Counts) -> None:
        self.seen += more.seen
        self.cut += more.cut
        self.cut_tokens += more.cut_tokens
        self.expanded += more.expanded
        self.pretokenized += more.pretokenized
        self.boundary_splits += more.boundary_splits
        self.dropped.update(more.dropped)
        self.ignored.update(more.ignored)
        add_checks(self.invariants, more.invariants)


@dataclass
class Block:
    """What came of a block of rows.

    table: (n,) of ROW, `start` counted from the block's first token.   spans: of SPAN, `row` counted from the block's
    first.   bad: of each quarantined row its source (place),
    reason and row.   sample: source and row of the first conversation that was rendered.   error: what stopped it.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.int8]
    table: NDArray[Any]
    counts: Counts = field(default_factory=Counts)
    bad: list[dict[str, Any]] = field(default_factory=list)
    sample: dict[str, Any] | None = None
    error: SftflowError | None = None
    spans: NDArray[Any] = field(default_factory=lambda: NO_SPANS)


def render_block(
    renderer: Renderer, job: Job, items: list[NumberedRow], n_verified: int, places: Places | None = None
) -> Block:
    """Render a block; its first `n_verified` rows are verified, all of them where it is negative.

    places: where its rows stand, if not all in the job's `prefix`."""
    places = places or Places([(0, job.prefix)])
    ids, masks = [np.empty(0, np.int32)], [np.empty(0, np.int8)]
    table: list[tuple[int, int, int, int, int, bool]] = []
    spans: list[tuple[int, int, int, float]] = []
    block = Block(ids[0], masks[0], np.empty(0, ROW))
    counts, start = block.counts, 0
    for count, (number, payload) in enumerate(items):
        counts.seen += 1
        try:
            conversation = conversation_of(payload, places[number])
            if conversation.ignored:
                counts.ignored.update(conversation.ignored)
            conversation = renderer.declared(conversation)
            fitted = fit_to_length(conversation, renderer, job.max_length, job.overlong)
        except (DataError, SchemaError, FormatError, MaskError) as error:
            if job.on_bad_row == "stop":
                block.error = error
                break
            block.bad.append({"source": places[number], "reason": str(error), "row": _shown(payload)})
            continue
        if fitted.dropped:
            counts.dropped[fitted.dropped] += 1
            continue
        counts.cut += fitted.cut
        counts.cut_tokens += fitted.cut and any(len(rendered.ids) > job.max_length for _, rendered in fitted.pairs)
        counts.expanded += len(fitted.pairs) > 1
        counts.pretokenized += conversation.tokens is not None
        if block.sample is None:
            first = fitted.pairs[0][0]
            text = {} if first.document is None else {"plain": True}
            block.sample = {"source": first.source, "row": first.to_row(), **text}
        verified = n_verified < 0 or count < n_verified
        prompts = renderer.prompts(conversation) if verified and conversation.messages else None
        document = conversation.document
        if verified and document is not None:
            wrong = verify_text(renderer, document, [rendered for _, rendered in fitted.pairs])
            add_checks(counts.invariants, checks(wrong, conversation))
        for rendered_from, rendered in fitted.pairs:
            if verified and document is None:
                wrong = verify(renderer, rendered_from, rendered, prompts)
                add_checks(counts.invariants, checks(wrong, conversation))
            rendered = first_tokens(rendered, job.max_length, renderer)
            row, mask = rendered.ids.astype(np.int32), rendered.mask
            if rendered.weights is not None:
                spans += spans_of(len(table), mask, rendered.weights)
            table.append((start, len(row), int(mask[1:].sum()), number, row_digest(row), document is not None))
            counts.boundary_splits += rendered.boundary_splits
            ids.append(row)
            masks.append(mask)
            start += len(row)
    block.ids, block.mask = np.concatenate(ids), np.concatenate(masks)
    block.table = np.array(table, ROW)
    block.spans = np.array(spans, SPAN) if spans else NO_SPANS
    return block


def _shown(payload: Any) -> Any:
    """A bad row for bad_rows.jsonl: as it stood."""
    if isinstance(payload, Conversation):
        return payload.to_row()
    if isinstance(payload, PlainText):
        payload = payload.row
    if isinstance(payload, Columned):
        payload = payload.row
    if isinstance(payload, bytes):
        return payload.decode("utf-8", "replace").rstrip("\r\n")
    try:  # Parquet has bytes and dates, a JSON file may be nested deeply
        return json.loads(json.dumps(payload, default=str))
    except (TypeError, ValueError, RecursionError):
        return "a row that cannot be written as JSON"


def n_cores() -> int:
    """Cores this process may use; all of the machine's where the system (not Linux) does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Processes that render blocks. A subprocess with a pipe, not multiprocessing: it starts without importing the
    caller's main module (a script without an `if __name__` guard works), and a fork after torch has started its
    threads is not safe."""

    def __init__(self, job: Job, n: int) -> None:
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", "from sftflow.data.render_pool import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(n)
        ]
        self._prefix = job.prefix
        self._threads = ThreadPoolExecutor(n)
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            _send(process, job)
            self._free.put(process)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what was still to be written is of no use to anybody now
                    pipe.close()
            process.wait()

    def render(
        self,
        blocks: Iterable[Question],
        here: Callable[[Question], Block] | None = None,
    ) -> Iterator[Block]:
        """The blocks' results in order; a few blocks are under way at a time, so memory stays flat.

        here: renders a block in this process, while the others have enough to do (and while they start).
        """
        n = len(self._processes)
        pending: deque[Future[Block]] = deque()
        for block in blocks:
            if here is not None and sum(not p.done() for p in pending) >= 2 * n:
                pending.append(Future())
                pending[-1].set_result(here(block))
            else:
                pending.append(self._threads.submit(self._ask, block))
            while pending and (len(pending) > 4 * n + 4 or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _ask(self, block: Question) -> Block:
        process = self._free.get()
        try:
            _send(process, block)
            assert process.stdout is not None
            answer: Block = pickle.load(process.stdout)
        except RecursionError:
            raise DataError(self._prefix, "a row is nested too deeply", "remove it") from None
        except (EOFError, OSError, pickle.UnpicklingError):
            raise RunError("rendering", "a worker process died", "is memory short? run with fewer cores") from None
        finally:
            self._free.put(process)
        return answer


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    assert process.stdin is not None
    pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us by closing the pipe
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        job: Job = pickle.load(requests)
        renderer = Renderer(None, job.spec.format, spec=job.spec)
        gc.freeze()  # the tokenizer's vocabulary need not be walked again and again
        gc.set_threshold(50_000)
        while True:
            question: Question = pickle.load(requests)
            pickle.dump(render_block(renderer, job, *question), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done with us, or gone
