"""A reply in the making: the calculator's protocol, where it ends, and what a person reads of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sftflow.calculator import calculate
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Part
from sftflow.generation.detokenize import SpokenText, detokenize
from sftflow.generation.request import Delta, FinishReason, GenerationRequest, Reply, TokenLogprob
from sftflow.generation.sampling import Sampler


class ReplyDecoder:
    """What generated ids mean in one chat format.

    python: (start, end, output start, output end) ids, or None.   stop: the ids that end a reply.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.python = renderer.python_ids()
        self.stop = frozenset(renderer.stop_ids())
        added = renderer.tokenizer.added_tokens_decoder
        self.control = frozenset(i for i, token in added.items() if token.special)

    def decode(self, ids: list[int]) -> str:
        text: str = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def spoken(self, stops: Sequence[str] = ()) -> SpokenText:
        """`text`, for ids that come one by one, up to the first of the stop texts."""
        return SpokenText(self.decode, self.control, self.python, stops)

    def parts(self, ids: Sequence[int]) -> tuple[Part, ...]:
        """Generated ids as text, calculator calls and their results; control tokens themselves are not text."""
        if self.python is None:
            return (Part("text", detokenize(self.decode, ids, self.control)),)
        start, end, output_start, output_end = self.python
        parts: list[Part] = []
        kind: Literal["text", "python", "python_output"] = "text"
        run: list[int] = []

        def close() -> None:
            if run:
                parts.append(Part(kind, detokenize(self.decode, run, self.control)))
                run.clear()

        for token in ids:
            if token in (start, output_start):
                close()
                kind = "python" if token == start else "python_output"
            elif token in (end, output_end):
                close()
                kind = "text"
            else:
                run.append(token)
        close()
        return tuple(parts)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(p.text for p in self.parts(ids) if p.kind == "text")

    def whole(self, ids: Sequence[int]) -> Sequence[int]:
        """Generated ids up to a calculator call that is not finished yet, or whose result is not."""
        if self.python is None:
            return ids
        start, end, *_ = self.python
        last = max((i for i, token in enumerate(ids) if token == start), default=None)
        if last is None:
            return ids
        call = ids[last + 1 :]
        if end in call:
            at = list(call).index(end)
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
    """One running reply.   room: the tokens it may have.   streamed: whether its text is wanted while it is made.

    error: what has ended it where nothing else has.
    """

    request: GenerationRequest
    speech: ReplyDecoder
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
        follow = self.streamed or bool(self.request.stop_texts)
        self._spoken = self.speech.spoken(self.request.stop_texts) if follow else None
        self._told = 0

    def start(self) -> None:
        """Its prompt is about to be computed."""
        self.began = time.perf_counter()

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def stop(self) -> frozenset[int]:
        return self.speech.stop if self.request.stop_ids is None else self.request.stop_ids

    def accept(self, token: int) -> None:
        """Book a token: follow the calculator's protocol, see whether the reply has ended."""
        self.ids.append(token)
        self.sampler.note(token)
        if self.speech.python is not None and self.request.use_python and not self.forced:
            start, end, *_ = self.speech.python
            if token == start:
                self.call = []
            elif token == end and self.call is not None:
                self.forced.extend(self.speech.result(self.call))
                self.call = None
            elif self.call is not None:
                self.call.append(token)
        stops, full = token in self.stop, len(self.ids) >= self.room
        spoken = self._spoken
        if spoken is not None:
            spoken.push(token)
            if (stops or full) and spoken.stopped_by is None:
                spoken.finish()
        if spoken is not None and spoken.stopped_by is not None:
            self.finish, self.stopped_by = "stop", spoken.stopped_by
        elif stops:
            self.finish, self.stopped_by = "stop", token
        elif full:
            self.finish = "length"

    def take(self) -> Delta:
        """What has come since it was last taken (streamed replies); at the end with the reply."""
        assert self._spoken is not None
        ends = self.finish is not None
        tokens: tuple[TokenLogprob, ...] = ()
        ids: tuple[int, ...] = ()
        if ends or not self._spoken.waits:
            tokens, ids = tuple(self.logprobs[self._told :]), tuple(self.ids[self._told :])
            self._told = len(self.ids)
        return Delta(self._spoken.take(), self.finish, self.reply() if ends else None, tokens, ids)

    def reply(self) -> Reply:
        assert self.finish is not None
        parts = self.speech.parts(self.ids)
        text = "".join(p.text for p in parts if p.kind == "text") if self._spoken is None else self._spoken.whole()
        return Reply(
            ids=tuple(self.ids),
            text=text,
            parts=parts,
            finish_reason=self.finish,
            n_prompt=len(self.request.prompt_ids),
            n_generated=len(self.ids) - (1 if self.ids and self.ids[-1] in self.stop else 0),
            seconds=time.perf_counter() - self.began,
            near_ties=tuple(self.near_ties),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            stopped_by=self.stopped_by,
        )
