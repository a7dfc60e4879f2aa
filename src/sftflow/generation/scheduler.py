"""Replies running side by side: who is let in, one more token for each, who leaves.

First come, first served. A reply that ends makes room, which the next waiting prompt takes at once. Where
`prompt_tokens` bounds what is read of prompts between two tokens, a long one is read in parts while the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from sftflow.foundation.errors import ContextError
from sftflow.generation.check_decoder import Decoder
from sftflow.generation.decoder import PackedDecoder
from sftflow.generation.kv_cache import Prefix
from sftflow.generation.request import GenerationRequest
from sftflow.generation.sampling import choose, token_logprobs
from sftflow.generation.sequence import ReplyDecoder, ReplySequence

EVERY = 256
"""tokens whose logits are all held at once"""


class Scheduler(AbstractContextManager["Scheduler"]):
    """Requests may be submitted, and given up, between any two tokens.

    An error while a prompt is read ends that request alone (`ReplySequence.error`). An error in the step that computes
    the next token ends all running replies. The scheduler stays usable after both.
    """

    def __init__(
        self,
        decoder: Decoder,
        reply_decoder: ReplyDecoder,
        *,
        context: int,
        max_running: int,
        prompt_tokens: int | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """context, max_running, tick: see `Engine`.   prompt_tokens: of prompts, at most so many are read between two
        tokens of the running replies; None: all of them. The decoder is closed with the scheduler."""
        self.context, self.max_running, self.prompt_tokens = context, max_running, prompt_tokens
        self._decoder, self._reply_decoder, self._tick = decoder, reply_decoder, tick
        self._n_shared = decoder.prefix.length if isinstance(decoder, PackedDecoder) else 0
        self._waiting: deque[ReplySequence] = deque()
        self._reading: tuple[ReplySequence, Prefix] | None = None  # a prompt that is read in parts, and what is known
        self._running: list[ReplySequence] = []
        self._logits: torch.Tensor | None = None  # of the running replies' next ones; only while `advance` runs
        self._count = 0

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running or self._reading)

    @property
    def running(self) -> int:
        """Replies that are generated, and the prompt that is being read."""
        return len(self._running) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: GenerationRequest, *, streamed: bool = False) -> int:
        """Put a request in line; its number, counted from 0. Raises ContextError where it has no room for a token.

        streamed: its sequence's `take` will be asked for what has come.
        """
        room = self.context - len(request.prompt_ids)
        if room < min(1, request.max_new_tokens) or not request.prompt_ids:
            if not request.prompt_ids:
                raise ContextError("prompt", "it has no tokens", "write something")
            fact = f"{len(request.prompt_ids)} tokens leave no room for a reply in a context of {self.context}"
            raise ContextError("prompt", fact, "shorten it")
        room = min(room, request.max_new_tokens)
        self._waiting.append(ReplySequence(request, self._reply_decoder, room, number=self._count, streamed=streamed))
        self._count += 1
        return self._count - 1

    def cancel(self, numbers: int | Iterable[int]) -> None:
        """Give requests up; nothing where they have ended already."""
        gone = {numbers} if isinstance(numbers, int) else set(numbers)
        self._waiting = deque(d for d in self._waiting if d.number not in gone)
        if self._reading is not None and self._reading[0].number in gone:
            self._reading = None
        kept = [i for i, d in enumerate(self._running) if d.number not in gone]
        if len(kept) < len(self._running):
            self._keep(kept)

    def advance(self) -> list[ReplySequence]:
        """One more token for every running reply. Returns those that got one, and those that have ended (`over`)."""
        ended: list[ReplySequence] = []
        self._tick()
        try:
            last = [sequence.ids[-1] for sequence in self._running]  # accepted, and still to be computed
            self._logits = self._decoder.step(last) if last else None
        except Exception as error:  # the weights are as they were, the replies are not to be saved
            ended = self._running
            self._keep([])
            for sequence in ended:
                sequence.error = error
        ended += self._admit()
        told = list(self._running)
        if told:
            self._choose()
            self._read_loops()
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

    def _choose(self) -> None:
        """The next token of every running reply."""
        assert self._logits is not None
        logits = self._logits
        if any(d.constraint is not None for d in self._running):
            logits = logits.clone()  # log-probabilities are of the model's own
            for row, sequence in zip(logits, self._running, strict=True):
                sequence.constrain(row)
        tokens, near = choose(logits, [d.sampler for d in self._running])
        for row, sequence in enumerate(self._running):
            if sequence.forced:
                tokens[row] = sequence.forced.popleft()
            elif near[row]:
                sequence.near_ties.append(len(sequence.ids))
        asked = [row for row, d in enumerate(self._running) if d.request.logprobs is not None]
        if asked:
            top = [self._running[row].request.logprobs or 0 for row in asked]
            found = token_logprobs(self._logits[asked], [tokens[row] for row in asked], top)
            for row, logprob in zip(asked, found, strict=True):
                self._running[row].logprobs.append(logprob)
        for sequence, token in zip(self._running, tokens, strict=True):
            if not sequence.over:
                sequence.accept(token)

    def _read_loops(self) -> None:
        """Where a reply goes round in a loop: guess its next tokens, read them at once, and keep those that the model
        would have chosen, up to its first other choice."""
        for row, sequence in enumerate(self._running):
            guess = sequence.guess() if isinstance(self._decoder, PackedDecoder) else []
            if len(guess) < 2:
                continue
            taking = partial(_take, sequence, guess)
            try:
                self._packed.follow(row, [sequence.ids[-1], *guess[:-1]], taking)
            except Exception as error:
                sequence.error = error

    def _admit(self) -> list[ReplySequence]:
        """Read the prompts of waiting requests, in order. Returns those that ended over it."""
        left, ended = self.prompt_tokens, []
        if self._running and not self._decoder.can_refill:
            return []
        few = min(len(self._waiting), max(1, self.max_running // 8))
        if left is None and self._running and self.max_running - self.running < few:
            return []  # a few at a time, since each call computes few tokens alone
        while left is None or left > 0:
            if self._reading is not None:
                sequences, n = [self._reading[0]], self._read(*self._reading, left)
            elif not self._waiting or self.running >= self.max_running:
                break
            elif self._in_parts(self._waiting[0]):
                sequence = self._waiting.popleft()
                sequence.start()
                every = sequence.request.prompt_logprobs is not None  # of the shared beginning, too
                shared = self._packed.prefix
                self._reading = sequence, Prefix() if every else replace(shared, layers=dict(shared.layers))
                continue
            else:
                sequences, n = self._group(self.max_running - self.running, left)
                if not sequences:
                    break
                self._add(sequences)
            ended += [sequence for sequence in sequences if sequence.over]
            if left is not None:
                left -= n
        return ended

    @property
    def _packed(self) -> PackedDecoder:
        assert isinstance(self._decoder, PackedDecoder)
        return self._decoder

    def _own_tokens(self, sequence: ReplySequence) -> int:
        """Tokens of its prompt behind those that all prompts share."""
        return len(sequence.request.prompt_ids) - self._n_shared

    def _in_parts(self, sequence: ReplySequence) -> bool:
        """Whether its prompt is read in parts: a long one, or one whose own log-probabilities are asked for."""
        if not isinstance(self._decoder, PackedDecoder):
            return False
        long = self.prompt_tokens is not None and self._own_tokens(sequence) > self.prompt_tokens
        return long or sequence.request.prompt_logprobs is not None

    def _group(self, free: int, left: int | None) -> tuple[list[ReplySequence], int]:
        """(requests from the head of the line that are computed together, their tokens)"""
        group: list[ReplySequence] = []
        tokens = 0
        while self._waiting and len(group) < free and not self._in_parts(self._waiting[0]):
            own = self._own_tokens(self._waiting[0])
            if left is not None and tokens + own > left and (group or left < (self.prompt_tokens or 0)):
                break
            tokens += own
            group.append(self._waiting.popleft())
        return group, tokens

    def _add(self, group: list[ReplySequence]) -> None:
        """Compute prompts at once; their replies run then, unless they are `over`."""
        for sequence in group:
            sequence.start()
            if sequence.request.prompt_logprobs is not None and not sequence.prompt_logprobs:
                assert not isinstance(self._decoder, PackedDecoder)  # it reads such prompts in parts
                try:
                    for logits in self._decoder.prompt_logits(sequence.request.prompt_ids):
                        sequence.tell_prompt(logits)
                except Exception as error:
                    sequence.error = error
            if sequence.room == 0 and sequence.error is None:
                sequence.finish = "length"
        group = [sequence for sequence in group if not sequence.over]
        if not group:
            return
        try:
            logits = self._decoder.add([sequence.request.prompt_ids for sequence in group])
        except Exception as error:
            for sequence in group:
                if len(group) > 1 and self._decoder.can_refill:  # which of them is it?
                    self._add([sequence])
                else:
                    sequence.error = error
        else:
            self._run(group, logits)

    def _run(self, sequences: list[ReplySequence], logits: torch.Tensor) -> None:
        """logits: of their first tokens."""
        self._logits = logits if self._logits is None else torch.cat([self._logits, logits])
        self._running += sequences

    def _read(self, sequence: ReplySequence, prefix: Prefix, left: int | None) -> int:
        """The next part of the prompt that is read in parts, at most `left` tokens; how many they were."""
        prompt, every = sequence.request.prompt_ids, sequence.request.prompt_logprobs is not None
        size = len(prompt) if left is None else left
        part = prompt[prefix.length :][: min(size, EVERY) if every else size]
        try:
            logits = self._packed.read(prefix, part, every=every)
            if every:
                sequence.tell_prompt(logits)
            if prefix.length < len(prompt):
                return len(part)
            if sequence.room > 0:
                self._packed.join(prefix)
                self._run([sequence], logits[-1:])
            else:
                sequence.finish = "length"
        except Exception as error:
            sequence.error = error
        self._reading = None
        return len(part)


def _take(sequence: ReplySequence, guess: Sequence[int], logits: torch.Tensor) -> int:
    """Accept what is likeliest after each token, as long as the next one was guessed; how many were read rightly."""
    tokens, near = choose(logits, [sequence.sampler] * len(logits))
    taken = 0
    for token, guessed, tie in zip(tokens, guess, near, strict=True):
        if sequence.forced:
            token = sequence.forced.popleft()
        elif tie:
            sequence.near_ties.append(len(sequence.ids))
        sequence.accept(token)
        taken += 1
        if sequence.over or token != guessed:
            break
    return taken
