"""All rows of a source asked: looked at first, so that nothing is begun that cannot be finished; then side by side.

Rows are read twice, as a stream. A reply that ends makes room for the next row at once, and waits for those in front of
it, at most `WINDOW` rows behind the one that takes longest.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sftflow.chat.files.names import Places
from sftflow.chat.schema import Conversation
from sftflow.evaluation.side_by_side import finite_logits
from sftflow.foundation.errors import DataError, SftflowError
from sftflow.foundation.sequences import common_prefix
from sftflow.generation.engine import SHARED
from sftflow.generation.request import Reply
from sftflow.replies.questions import Asker, Question

WINDOW = 4096
"""rows between the first unfinished one and the last that is asked: a reply of the longest, 1,024 tokens, beside others
of ten tokens each in the engine's 32 places"""


@dataclass(frozen=True)
class RowSource:
    """numbered: gives (number, row) anew at each call, rows as `chat.data_files.numbered_rows` has them.
    name: what all of them are called.   places: where each row stands, as far as they were read."""

    name: str
    numbered: Callable[[Places], Iterable[tuple[int, Any]]]
    places: Places = field(default_factory=Places)

    def rows(self) -> Iterable[tuple[int, Any]]:
        return self.numbered(self.places)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of a source once every row has been looked at.

    rows: those that will be asked.   skipped, first_skipped: rows that cannot be, and what is wrong with the first.
    digest: of all rows.   shared: ids that all prompts begin with.   longest: tokens of the longest prompt and reply.
    """

    rows: int
    digest: str
    skipped: int = 0
    first_skipped: str | None = None
    shared: tuple[int, ...] = ()
    longest: int = 0


def digest_of_rows(source: RowSource, each: Callable[[int, Any], None] = lambda number, payload: None) -> str:
    """Of every row and its number.   each: told of each on the way."""
    digest = hashlib.sha256()
    for number, payload in source.rows():
        each(number, payload)
        if isinstance(payload, Conversation):
            payload = payload.to_row()
        line = payload if isinstance(payload, bytes) else json.dumps(payload, sort_keys=True, default=str).encode()
        digest.update(b"%d %d " % (number, len(line)) + line)
    return digest.hexdigest()


def survey(
    source: RowSource, asker: Asker, *, skip: bool = False, looked: Callable[[int], None] = lambda n: None
) -> Survey:
    """Look at every row.   skip: leave out those that cannot be asked.   looked: told how many it were so far.

    Raises what is wrong with the first row that cannot be asked; DataError where there is none that can.
    """
    shared: tuple[int, ...] | None = None
    n = rows = longest = 0
    bad: list[str] = []

    def look(number: int, payload: Any) -> None:
        nonlocal shared, n, rows, longest
        n += 1
        looked(n)
        try:
            request = asker.question(number, payload, source.places[number]).request
        except SftflowError as error:
            if not skip:
                raise
            bad.append("" if bad else str(error))
            return
        rows, ids = rows + 1, request.prompt_ids
        shared = ids[:-1] if shared is None else ids[: min(common_prefix(shared, ids), len(ids) - 1)]
        longest = max(longest, len(ids) + request.max_new_tokens)

    digest = digest_of_rows(source, look)
    if not rows:
        why = f"none of its rows can be asked (the first: {bad[0]})" if bad else "no rows in it"
        raise DataError(source.name, why, "give a file with questions")
    return Survey(
        rows=rows,
        digest=digest,
        skipped=len(bad),
        first_skipped=bad[0] if bad else None,
        shared=shared if shared and rows > 1 and len(shared) >= SHARED else (),
        longest=longest,
    )


def replies(
    source: RowSource, asker: Asker, known: Survey, *, skip: bool = False, behind: int = 0
) -> Iterator[tuple[Question, Reply]]:
    """Every row's question and reply, in the order of the rows.   behind: only of rows with a greater number.

    Raises RunError where the model's logits are not finite.
    """
    engine = asker.assistant.engine
    questions = _questions(source, asker, skip, behind)
    line: deque[tuple[int, Question]] = deque()  # those that have no reply yet, or wait for one that has none
    done: dict[int, Reply] = {}
    engine.decode_mode(known.longest)  # found out before logits are looked at: it may try ways that give none
    with (
        finite_logits(asker.assistant.model, asker.assistant.name),
        engine.scheduler(shared_prefix=known.shared, longest=known.longest) as scheduler,
    ):
        while True:
            while scheduler.waiting < engine.max_running and len(line) < WINDOW:
                question = next(questions, None)
                if question is None:
                    break
                line.append((scheduler.submit(question.request), question))
            if not line:
                return
            for sequence in scheduler.advance():
                if sequence.error is not None:
                    raise sequence.error
                if sequence.finish is not None:
                    done[sequence.number] = sequence.reply()
            while line and line[0][0] in done:
                number, question = line.popleft()
                yield question, done.pop(number)


def _questions(source: RowSource, asker: Asker, skip: bool, behind: int) -> Iterator[Question]:
    for number, payload in source.rows():
        if number > behind:
            try:
                yield asker.question(number, payload, source.places[number])
            except SftflowError:
                if not skip:
                    raise
