"""A reply in the making: the calculator's protocol, where it ends, and what a person reads of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Part
from sftflow.foundation.calculator import calculate
from sftflow.foundation.errors import GrammarError
from sftflow.generation.constraint import Constraint
from sftflow.generation.detokenize import Detokenizer, ReplyText, detokenize
from sftflow.generation.loops import LoopWatch
from sftflow.generation.request import Delta, FinishReason, GenerationRequest, Reply, TokenLogprob
from sftflow.generation.sampling import Sampler, token_logprobs

Kind = Literal["text", "python", "python_output"]
KINDS: tuple[Kind, ...] = ("python", "text", "python_output", "text")
"""what follows each of `ReplyDecoder.python`"""


class ReplyDecoder:
    """What generated ids mean in one chat format.

    python: the ids around a calculator call and its result (call start, call end, output start, output end), or None.
    stop: the ids that end a reply.   control: the ids of control tokens, which are no text.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.python = renderer.python_ids()
        self.stop = frozenset(renderer.stop_ids())
        self.control = frozenset(renderer.special.values())
        self._ends = renderer.ends()

    def decode(self, ids: list[int]) -> str:
        shown = [i for i in ids if i not in self.control]  # an end of turn need not be one of the "special" tokens
        text: str = self.renderer.tokenizer.decode(shown, skip_special_tokens=True)
        return text

    def length_without_end(self, ids: Sequence[int], stop: Collection[int]) -> int:
        """How many ids come before the end of turn that they stopped with, at one of `stop`."""
        n = len(ids)
        if not n or ids[-1] not in stop:
            return n
        return n - next((len(end) for end in self._ends if tuple(ids[-len(end) :]) == end), 1)

    def ends_with(self, stop: Collection[int]) -> list[tuple[int, ...]]:
        """The ids of each end of turn that ends at one of `stop`; these alone are ends, too."""
        return list(dict.fromkeys([*(end for end in self._ends if end[-1] in stop), *((i,) for i in sorted(stop))]))

    def begins_end(self, ids: Sequence[int]) -> bool:
        """Whether these ids are the beginning of an end of turn, or all of one."""
        return any(end[: len(ids)] == tuple(ids) for end in self._ends)

    def reply_text(self, stops: Sequence[str] = (), shown: Sequence[tuple[int, str]] = ()) -> ReplyText:
        """The text parts joined, for ids that come one by one, up to the first of the stop texts. shown: as in
        `GenerationRequest`."""
        return ReplyText(Detokenizer(self.decode, self.control), self.python, stops, shown)

    def parts(self, ids: Sequence[int]) -> tuple[Part, ...]:
        """Generated ids as text, calculator calls and their results; control tokens themselves are not text."""
        if self.python is None:
            return (Part("text", detokenize(self.decode, ids, self.control)),)
        kind_after = dict(zip(self.python, KINDS, strict=True))
        parts: list[Part] = []
        kind: Kind = "text"
        run: list[int] = []
        for token in (*ids, self.python[-1]):  # the added one ends the last run
            if token not in kind_after:
                run.append(token)
                continue
            if run:
                parts.append(Part(kind, detokenize(self.decode, run, self.control)))
            kind, run = kind_after[token], []
        return tuple(parts)

    def without_open_call(self, ids: Sequence[int]) -> Sequence[int]:
        """Generated ids up to a calculator call that is not finished yet, or whose result is not."""
        if self.python is None or self.python[0] not in ids:
            return ids
        start, end, *_ = self.python
        last = max(i for i, token in enumerate(ids) if token == start)
        call = list(ids[last + 1 :])
        if end in call:
            at = call.index(end)
            if len(call) - at - 1 >= len(self.result(call[:at])):
                return ids
        return ids[:last]

    def result(self, call: Sequence[int]) -> list[int]:
        """The ids that follow a calculator call: its value between the output tokens; none where it has no value."""
        value = calculate(self.renderer.tokenizer.decode(list(call)))
        if value is None or self.python is None:
            return []
        return [self.python[2], *self.renderer.encode_plain(value), self.python[3]]


@dataclass
class ReplySequence:
    """One reply while it is generated.

    room: the tokens it may have.   number: its place among its scheduler's requests.   streamed: whether its text is
    wanted piece by piece (`take`).   ids: the reply's tokens so far.   forced: tokens that come next whatever the model
    would choose: a calculator's result.   call: the tokens of a calculator call that is open.   error: what ended it,
    in place of `finish`.   The rest is what `Reply` reports.
    """

    request: GenerationRequest
    decoder: ReplyDecoder
    room: int
    number: int = 0
    streamed: bool = False
    ids: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None
    finish: FinishReason | None = None
    error: Exception | None = None
    stopped_by: int | str | None = None
    near_ties: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    began: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)
        grammar = self.request.grammar
        self.constraint = Constraint(grammar, self.decoder.ends_with(self.stop)) if grammar is not None else None
        # The text is followed token by token where somebody reads along, or where it may end the reply.
        asked = self.request
        follow = self.streamed or bool(asked.stop_texts or asked.shown)
        self._follower = self.decoder.reply_text(asked.stop_texts, asked.shown) if follow else None
        greedy = self.sampler.greedy and not self.sampler.penalised
        guess = asked.loops_at_once and greedy and grammar is None and asked.logprobs is None
        self._watch = LoopWatch() if guess else None
        self._held: list[int] = []  # ids that may be the beginning of the end, which is not said
        self._text = ""  # what the follower has given
        self._n_taken = 0  # characters of it
        self._n_told = 0  # ids that `take` has handed out

    def start(self) -> None:
        """Its prompt is about to be computed."""
        self.began = time.perf_counter()

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def stop(self) -> frozenset[int]:
        return self.decoder.stop if self.request.stop_ids is None else self.request.stop_ids

    def tell_prompt(self, logits: torch.Tensor) -> None:
        """Book the log-probabilities of prompt tokens. logits: (n, vocabulary), after the next n of them."""
        told = self.prompt_logprobs
        if not told:
            told.append(None)
        following = self.request.prompt_ids[len(told) :][: len(logits)]
        if following:
            top = [self.request.prompt_logprobs or 0] * len(following)
            told += token_logprobs(logits[: len(following)], following, top)

    def constrain(self, logits: torch.Tensor) -> None:
        """(vocabulary,) in place: -inf where its grammar lets no token come; `error` where it lets none at all."""
        if self.constraint is None:
            return
        try:
            if not self.ids:
                self.constraint.begin(int(logits.argmax()))
            allowed = self.constraint.allowed()
        except GrammarError as error:
            self.error = error
            return
        n = min(len(allowed), len(logits))
        logits[n:] = -math.inf
        logits[:n].masked_fill_(~allowed[:n].to(logits.device), -math.inf)

    def accept(self, token: int) -> None:
        """Book a token: follow the calculator's protocol, see whether the reply has ended."""
        self.ids.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        self.sampler.note(token)
        if self.decoder.python is not None and self.request.use_python and not self.forced:
            start, end, *_ = self.decoder.python
            if token == start:
                self.call = []
            elif token == end and self.call is not None:
                self.forced.extend(self.decoder.result(self.call))
                self.call = None
            elif self.call is not None:
                self.call.append(token)
        stops, full = token in self.stop, len(self.ids) >= self.room
        follower = self._follower
        if follower is not None:
            self._held.append(token)
            n_end = len(self.ids) - self.decoder.length_without_end(self.ids, self.stop)
            while self._held[: len(self._held) - n_end] and (stops or full or not self.decoder.begins_end(self._held)):
                self._text += follower.feed(self._held.pop(0))
            if (stops or full) and follower.stopped_by is None:
                self._text += follower.flush()
        if follower is not None and follower.stopped_by is not None:
            self.finish, self.stopped_by = "stop", follower.stopped_by
        elif stops:
            self.finish, self.stopped_by = "stop", token
        elif self.constraint is not None and self.constraint.over and not self.stop:
            self.finish = "stop"  # its end of turn would be next, and has been switched off
        elif full:
            self.finish = "length"
        if self._watch is not None:
            self._watch.add(token)

    def guess(self) -> list[int]:
        """The tokens that come next if it goes on in a loop; [] where it is in none, or is not to be guessed."""
        return [] if self._watch is None or self.over else self._watch.guess(self.room - len(self.ids))

    def take(self) -> Delta:
        """What has come since it was last taken, at the end with the reply; unless streamed, all at the end."""
        reply = None if self.finish is None else self.reply()
        if reply is None and not self.streamed:
            return Delta("")
        tokens: tuple[TokenLogprob, ...] = ()
        ids: tuple[int, ...] = ()
        if reply is not None or (self._follower is not None and not self._follower.waits and not self._held):
            tokens, ids = tuple(self.logprobs[self._n_told :]), tuple(self.ids[self._n_told :])
            self._n_told = len(self.ids)
        so_far = self._text if reply is None else reply.text
        text, self._n_taken = so_far[self._n_taken :], len(so_far)
        return Delta(text, self.finish, reply, tokens, ids)

    def reply(self) -> Reply:
        assert self.finish is not None
        n_said = self.decoder.length_without_end(self.ids, self.stop)
        parts = self.decoder.parts(self.ids[:n_said])
        text = "".join(p.text for p in parts if p.kind == "text") if self._follower is None else self._text
        return Reply(
            ids=tuple(self.ids),
            text=text,
            parts=parts,
            finish_reason=self.finish,
            n_prompt=len(self.request.prompt_ids),
            n_generated=n_said,
            seconds=time.perf_counter() - self.began,
            near_ties=tuple(self.near_ties),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            stopped_by=self.stopped_by,
        )
