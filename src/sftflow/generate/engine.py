"""The one generation engine: continuous batching, the calculator inside the reply, streaming.

Evaluation, comparison, terminal chat and server all call it. A `Session` holds the replies that run side by side; one
that ends makes room, which the next waiting prompt takes at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from sftflow.chat.render import Renderer
from sftflow.errors import ContextError
from sftflow.generate.decoder import Decoder, PackedDecoder
from sftflow.generate.draft import Draft, Speech
from sftflow.generate.linear import OrderedWeights, ordered_weights
from sftflow.generate.own import PaddedDecoder, SingleDecoder
from sftflow.generate.prove import Way, find_way
from sftflow.generate.request import Delta, FinishReason, Reply, Request
from sftflow.generate.sampling import likeliest, sample
from sftflow.packed.bounds import length_bound
from sftflow.runtime import Runtime

__all__ = ["Delta", "Engine", "FinishReason", "Reply", "Request", "Session", "sample"]

SHARED = 16
"""a beginning that all prompts have in common is computed once from so many tokens on"""


class Engine:
    """Generates with one model and one format. Not re-entrant: one session at a time.

    slots: replies that run side by side.   tick: called before every forward pass; what it raises ends the work.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        runtime: Runtime,
        *,
        slots: int = 32,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.renderer, self.runtime, self.slots = model, renderer, runtime, slots
        self.tick = tick or (lambda: None)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        self.speech = Speech(renderer)
        bound = length_bound(model)
        self._bound = self.context if bound is None else min(self.context, bound[0])
        self._ways: dict[bool, Way] = {}
        self._ordered: OrderedWeights | None = None

    def way(self, longest: int | None = None) -> Way:
        """How this model is decoded where no sequence is longer than `longest` tokens (None: than the context allows);
        found out once. Raises CheckpointError where the model cannot be computed."""
        short = (self.context if longest is None else longest) <= self._bound
        if short not in self._ways:
            # Beyond the bound a neighbour's length would change a row's numbers, so each is computed alone.
            ways: list[Way] = ["packed", "padded", "single"] if short else ["single"]
            self._ways[short] = find_way(self.model, self.runtime, ways)
            if self._ways[short] == "packed" and self.runtime.precision == "fp32":
                self._ordered = ordered_weights(self.model)
        return self._ways[short]

    def decoder(self, held: Sequence[int] = (), longest: int | None = None) -> Decoder:
        """The fastest decoder that is right for this model. held: ids that every prompt will begin with.
        longest: tokens that the longest sequence may grow to; None: as many as the context has."""
        way = self.way(longest)
        if way == "packed":
            return PackedDecoder(self.model, self.runtime, held=held, ordered=self._ordered)
        if way == "padded":
            return PaddedDecoder(self.model, self.runtime)
        return SingleDecoder(self.model, self.runtime, cached=self._bound if way == "single" else 0)

    def generate(self, requests: Sequence[Request], done: Callable[[int, Reply], None] | None = None) -> list[Reply]:
        """All replies, in the order of the requests. `done(i, reply)` is told of each when it finishes.

        Raises ContextError where a prompt leaves no room for a token.
        """
        out: list[Reply | None] = [None] * len(requests)
        # Longest first: a lack of memory shows at once, and the last to run are short.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
        with Session(self, held=common_beginning([r.prompt_ids for r in requests]), longest=longest) as session:
            for i in order:
                session.submit(requests[i])
            while session.busy:
                for draft in session.advance():
                    if draft.finish is not None:
                        i = order[draft.number]
                        reply = out[i] = draft.reply()
                        if done:
                            done(i, reply)
        return [r for r in out if r is not None]

    def stream(self, request: Request) -> Iterator[Delta]:
        """The same reply as `generate([request])`, piece by piece. Closing the iterator stops the work."""
        shown = ""
        with Session(self, longest=len(request.prompt_ids) + request.max_new_tokens) as session:
            session.submit(request)
            while session.busy:
                (draft,) = session.advance()
                if draft.finish is None:
                    text = draft.shown()
                    new = text[len(shown) :] if text.startswith(shown) else ""
                    shown += new
                    yield Delta(new)  # empty, too: whoever listens can stop at any token
                else:
                    reply = draft.reply()
                    rest = reply.text[len(shown) :] if reply.text.startswith(shown) else ""
                    yield Delta(rest, draft.finish, reply)

    def choice_scores(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[int]],
        done: Callable[[int, list[float]], None] | None = None,
    ) -> list[list[float]]:
        """For each prompt, the log-probability of each of its options as the very next token."""
        out: list[list[float]] = [[] for _ in prompts]
        # Prompts that begin alike side by side: what they share is computed once.
        order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
        decoder = self.decoder(common_beginning(prompts), max(map(len, prompts), default=0))
        try:
            for start in range(0, len(order), self.slots):
                self.tick()
                group = order[start : start + self.slots]
                logprobs = decoder.scores([prompts[i] for i in group]).log_softmax(-1)
                for row, i in enumerate(group):
                    out[i] = [float(logprobs[row, o]) for o in options[i]]
                    if done:
                        done(i, out[i])
        finally:
            decoder.close()
        return out


class Session:
    """Replies running side by side. Requests may be submitted, and given up, between any two tokens."""

    def __init__(self, engine: Engine, *, held: Sequence[int] = (), longest: int | None = None) -> None:
        """held: ids that every prompt of the session begins with.   longest: see `Engine.decoder`."""
        self.engine = engine
        self._decoder = engine.decoder(held, longest)
        self._waiting: deque[Draft] = deque()
        self._running: list[Draft] = []
        self._logits: torch.Tensor | None = None  # of the next token of every running reply
        self._count = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, request: Request) -> int:
        """Put a request in line; its number, counted from 0. Raises ContextError where it has no room for a token."""
        room = self.engine.context - len(request.prompt_ids)
        if room < 1 or not request.prompt_ids:
            fact = f"{len(request.prompt_ids)} tokens leave no room in a context of {self.engine.context}"
            raise ContextError("prompt", fact if request.prompt_ids else "it has no tokens", "shorten or fill it")
        room = min(room, request.max_new_tokens)
        self._waiting.append(Draft(request, self.engine.speech, room, number=self._count))
        self._count += 1
        return self._count - 1

    def cancel(self, number: int) -> None:
        """Give a request up; nothing where it has ended already."""
        self._waiting = deque(d for d in self._waiting if d.number != number)
        kept = [i for i, d in enumerate(self._running) if d.number != number]
        if len(kept) < len(self._running):
            logits = self._logits
            self._close_up(kept)
            if logits is not None:
                self._logits = logits[kept]

    def advance(self) -> list[Draft]:
        """One more token for every running reply; those with `finish` set have ended with it."""
        self.engine.tick()
        self._admit()
        told, tokens = list(self._running), self._choose()
        for draft, token in zip(told, tokens, strict=True):
            draft.accept(token)
        n = sum(d.finish is None for d in told)
        if n < len(told):
            # Rows that go on stay where they are; the last ones move into the places that became free.
            going = [i for i, d in enumerate(told) if d.finish is None]
            tail = deque(i for i in going if i >= n)
            kept = [i if told[i].finish is None else tail.popleft() for i in range(n)]
            self._close_up(kept)
            tokens = [tokens[i] for i in kept]
        self._logits = self._decoder.step(tokens) if tokens else None
        return told

    def _close_up(self, rows: list[int]) -> None:
        self._decoder.keep(rows)
        self._running = [self._running[i] for i in rows]

    def _admit(self) -> None:
        """Let waiting requests in. A few at a time, since each call computes few tokens alone."""
        free = self.engine.slots - len(self._running)
        if not self._waiting or (self._running and not self._decoder.can_refill):
            return
        if self._running and free < min(len(self._waiting), max(1, self.engine.slots // 8)):
            return
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for draft in new:
            draft.start()
        logits = self._decoder.add([d.request.prompt_ids for d in new])
        self._logits = logits if self._logits is None else torch.cat([self._logits, logits])
        self._running += new

    def _choose(self) -> list[int]:
        """The next token of every running reply."""
        assert self._logits is not None
        greedy, near = likeliest(self._logits)
        tokens = []
        for row, draft in enumerate(self._running):
            if draft.forced:
                tokens.append(draft.forced.popleft())
            elif draft.generator is not None:
                tokens.append(sample(self._logits[row].cpu(), draft.request, draft.generator))
            else:
                tokens.append(greedy[row])
                if near[row]:
                    draft.near_ties.append(len(draft.ids))
        return tokens


def common_beginning(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that several prompts all begin with, where that is worth computing apart; one at least is left."""
    if len(prompts) < 2:
        return ()
    shared = min(len(p) for p in prompts) - 1
    for a, b in pairwise(prompts):
        shared = next((i for i in range(shared) if a[i] != b[i]), shared)
    return tuple(prompts[0][:shared]) if shared >= SHARED else ()
