"""Replies running side by side: who is let in, one more token for each, who leaves.

First come, first served. A reply that ends makes room, which the next waiting prompt takes at once. Where
`prompt_tokens` bounds what is read of prompts between two tokens, a long one is read in parts while the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from sftflow.errors import ContextError
from sftflow.generate.decoder import EVERY, PackedDecoder
from sftflow.generate.draft import Draft
from sftflow.generate.request import Request
from sftflow.generate.sampling import choose, token_logprobs

if TYPE_CHECKING:
    from sftflow.generate.engine import Engine


class Session:
    """Requests may be submitted, and given up, between any two tokens.

    What goes wrong with a prompt ends that request alone (`Draft.error`); what goes wrong with the running ones' next
    token ends those; the session can be used on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        held: Sequence[int] = (),
        longest: int | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        """held: ids that every prompt of the session begins with.   longest: see `Engine.decoder`.
        prompt_tokens: of prompts, at most so many are read between two tokens of the running replies."""
        self.engine = engine
        self._held = len(held)
        self._decoder = engine.decoder(held, longest)
        self._bound = prompt_tokens
        self._waiting: deque[Draft] = deque()
        self._reading: tuple[Draft, int] | None = None  # a prompt that is read in parts, and how far
        self._running: list[Draft] = []
        self._tokens: list[int] = []  # the running replies' last ones, which are still to be computed
        self._logits: torch.Tensor | None = None  # of the running replies' next ones; only while `advance` runs
        self._count = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running or self._reading)

    @property
    def running(self) -> int:
        """Replies that have a slot."""
        return len(self._running) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request, *, streamed: bool = False) -> int:
        """Put a request in line; its number, counted from 0. Raises ContextError where it has no room for a token.

        streamed: its draft's `take` will be asked for what has come.
        """
        room = self.engine.context - len(request.prompt_ids)
        if room < min(1, request.max_new_tokens) or not request.prompt_ids:
            fact = f"{len(request.prompt_ids)} tokens leave no room in a context of {self.engine.context}"
            raise ContextError("prompt", fact if request.prompt_ids else "it has no tokens", "shorten or fill it")
        room = min(room, request.max_new_tokens)
        self._waiting.append(Draft(request, self.engine.speech, room, number=self._count, streamed=streamed))
        self._count += 1
        return self._count - 1

    def cancel(self, numbers: int | Iterable[int]) -> None:
        """Give requests up; nothing where they have ended already."""
        gone = {numbers} if isinstance(numbers, int) else set(numbers)
        self._waiting = deque(d for d in self._waiting if d.number not in gone)
        if self._reading is not None and self._reading[0].number in gone:
            self._stop_reading()
        kept = [i for i, d in enumerate(self._running) if d.number not in gone]
        if len(kept) < len(self._running):
            self._keep(kept)

    def advance(self) -> list[Draft]:
        """One more token for every running reply. Returns those that got one, and those that have ended (`over`)."""
        ended: list[Draft] = []
        self.engine.tick()
        try:
            self._logits = self._decoder.step(self._tokens) if self._tokens else None
        except Exception as error:  # the weights are as they were, the replies are not to be saved
            ended = self._running
            self._decoder.keep([])
            self._running, self._tokens = [], []
            for draft in ended:
                draft.error = error
        ended += self._admit()
        told = list(self._running)
        if told:
            self._choose()
            n = sum(not d.over for d in told)
            if n < len(told):
                # Rows that go on stay where they are; the last ones move into the places that became free.
                tail = deque(i for i in range(n, len(told)) if not told[i].over)
                self._keep([tail.popleft() if told[i].over else i for i in range(n)])
        self._logits = None
        return ended + told

    def _keep(self, rows: list[int]) -> None:
        self._decoder.keep(rows)
        self._running = [self._running[i] for i in rows]
        self._tokens = [self._tokens[i] for i in rows]

    def _choose(self) -> None:
        """The next token of every running reply."""
        assert self._logits is not None
        tokens, near = choose(self._logits, [d.sampler for d in self._running])
        for row, draft in enumerate(self._running):
            if draft.forced:
                tokens[row] = draft.forced.popleft()
            elif near[row]:
                draft.near_ties.append(len(draft.ids))
        asked = [row for row, d in enumerate(self._running) if d.request.logprobs is not None]
        if asked:
            top = [self._running[row].request.logprobs or 0 for row in asked]
            found = token_logprobs(self._logits[asked], [tokens[row] for row in asked], top)
            for row, logprob in zip(asked, found, strict=True):
                self._running[row].logprobs.append(logprob)
        for draft, token in zip(self._running, tokens, strict=True):
            draft.accept(token)
        self._tokens = tokens

    def _admit(self) -> list[Draft]:
        """Let waiting requests in. Returns those that ended at the door."""
        slots, left, ended = self.engine.slots, self._bound, []
        if self._running and not self._decoder.can_refill:
            return []
        if left is None and self._running and slots - self.running < min(len(self._waiting), max(1, slots // 8)):
            return []  # a few at a time, since each call computes few tokens alone
        while left is None or left > 0:
            if self._reading is not None:
                done, read = self._read(left)
                ended += done
            elif not self._waiting or self.running >= slots:
                break
            elif self._in_parts(self._waiting[0]):
                draft, read = self._waiting.popleft(), 0
                draft.start()
                whole = draft.request.prompt_logprobs is not None
                self._reading = (draft, self._packed.open(whole=whole))
            else:
                group, read = self._group(slots - self.running, left)
                if not group:
                    break
                ended += self._add(group)
            if left is not None:
                left -= read
        return ended

    @property
    def _packed(self) -> PackedDecoder:
        assert isinstance(self._decoder, PackedDecoder)
        return self._decoder

    def _in_parts(self, draft: Draft) -> bool:
        """Whether its prompt is read in parts: a long one, or one whose own tokens are asked for."""
        if not isinstance(self._decoder, PackedDecoder):
            return False
        own = len(draft.request.prompt_ids) - self._held
        return draft.request.prompt_logprobs is not None or (self._bound is not None and own > self._bound)

    def _group(self, free: int, left: int | None) -> tuple[list[Draft], int]:
        """(requests from the head of the line that are computed together, their tokens)"""
        group: list[Draft] = []
        tokens = 0
        while self._waiting and len(group) < free and not self._in_parts(self._waiting[0]):
            own = len(self._waiting[0].request.prompt_ids) - self._held
            if left is not None and tokens + own > left and (group or left < (self._bound or 0)):
                break
            tokens += own
            group.append(self._waiting.popleft())
        return group, tokens

    def _add(self, group: list[Draft]) -> list[Draft]:
        """Compute prompts, whose replies then run. Returns those that did not come to that."""
        ended: list[Draft] = []
        for draft in group:
            draft.start()
            if draft.request.prompt_logprobs is not None and not draft.prompt_logprobs:
                try:
                    for logits in self._decoder.prompt_logits(draft.request.prompt_ids):
                        self._tell_prompt(draft, logits)
                except Exception as error:
                    draft.error = error
            if draft.room == 0 and draft.error is None:
                draft.finish = "length"
            if draft.over:
                ended.append(draft)
        group = [d for d in group if not d.over]
        if not group:
            return ended
        try:
            logits = self._decoder.add([d.request.prompt_ids for d in group])
        except Exception as error:
            if len(group) > 1 and self._decoder.can_refill:  # which of them is it?
                return ended + [d for draft in group for d in self._add([draft])]
            for draft in group:
                draft.error = error
            return ended + group
        self._run(group, logits)
        return ended

    def _run(self, drafts: list[Draft], logits: torch.Tensor) -> None:
        """logits: of their first tokens."""
        self._logits = logits if self._logits is None else torch.cat([self._logits, logits])
        self._running += drafts

    def _read(self, left: int | None) -> tuple[list[Draft], int]:
        """The next part of the prompt that is read in parts. Returns (the request where it has ended, tokens read)."""
        assert self._reading is not None
        draft, at = self._reading
        prompt, every = draft.request.prompt_ids, draft.request.prompt_logprobs is not None
        size = len(prompt) - at if left is None else left
        part = prompt[at : at + (min(size, EVERY) if every else size)]
        try:
            logits = self._packed.read(part, every=every)
            if every:
                self._tell_prompt(draft, logits)
            at += len(part)
            if at < len(prompt):
                self._reading = (draft, at)
                return [], len(part)
            if draft.room > 0:
                self._packed.join()
                self._run([draft], logits[-1:])
            else:
                draft.finish = "length"
        except Exception as error:
            draft.error = error
        self._stop_reading()
        return ([draft] if draft.over else []), len(part)

    def _stop_reading(self) -> None:
        self._reading = None
        self._packed.drop()

    def _tell_prompt(self, draft: Draft, logits: torch.Tensor) -> None:
        """(n, vocabulary) logits after the prompt's next n tokens tell of those that follow them."""
        prompt, told = draft.request.prompt_ids, draft.prompt_logprobs
        if not told:
            told.append(None)
        following = prompt[len(told) : len(told) + len(logits)]
        if following:
            top = [draft.request.prompt_logprobs or 0] * len(following)
            told += token_logprobs(logits[: len(following)], following, top)
