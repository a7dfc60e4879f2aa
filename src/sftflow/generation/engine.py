"""The one generation engine: continuous batching, the calculator inside the reply, streaming.

Evaluation, comparison, terminal chat and server all call it. A `Scheduler` holds the replies that run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from sftflow.chat.render import Renderer
from sftflow.generation.check_decoder import DecodeMode, find_decode_mode
from sftflow.generation.decoder import Decoder, PackedDecoder
from sftflow.generation.hf_decoders import PaddedDecoder, SingleDecoder
from sftflow.generation.onednn import OrderedWeights, ordered_weights
from sftflow.generation.request import Delta, FinishReason, GenerationRequest, Reply, TokenLogprob
from sftflow.generation.scheduler import Scheduler
from sftflow.generation.sequence import ReplyDecoder
from sftflow.packing.length_limits import length_bound
from sftflow.runtime import Runtime

__all__ = ["Delta", "Engine", "FinishReason", "GenerationRequest", "Reply", "Scheduler", "TokenLogprob"]

SHARED = 16
"""a beginning that all prompts have in common is computed once from so many tokens on"""


class Engine:
    """Generates with one model and one format. Not re-entrant: one session at a time.

    slots: replies that run side by side.   bound: tokens up to which a row's numbers hang on nothing but the row.
    tick: called before every forward pass; what it raises ends the work.
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
        self.speech = ReplyDecoder(renderer)
        bound = length_bound(model)
        self.bound = self.context if bound is None else min(self.context, bound[0])
        self._modes: dict[bool, DecodeMode] = {}
        self._ordered: OrderedWeights | None = None

    def decode_mode(self, longest: int | None = None) -> DecodeMode:
        """How this model is decoded where no sequence is longer than `longest` tokens (None: than the context allows);
        found out once. Raises CheckpointError where the model cannot be computed."""
        short = (self.context if longest is None else longest) <= self.bound
        if short not in self._modes:
            # Beyond the bound a neighbour's length would change a row's numbers, so each is computed alone.
            modes: list[DecodeMode] = ["packed", "padded", "single"] if short else ["single"]
            self._modes[short] = find_decode_mode(self.model, self.runtime, modes)
            if self._modes[short] == "packed" and self.runtime.precision == "fp32":
                self._ordered = ordered_weights(self.model)
        return self._modes[short]

    def decoder(self, shared_prefix: Sequence[int] = (), longest: int | None = None) -> Decoder:
        """The fastest decoder that is right for this model. shared_prefix: ids that every prompt will begin with.
        longest: tokens that the longest sequence may grow to; None: as many as the context has."""
        mode = self.decode_mode(longest)
        if mode == "packed":
            return PackedDecoder(self.model, self.runtime, shared_prefix=shared_prefix, ordered=self._ordered)
        if mode == "padded":
            return PaddedDecoder(self.model, self.runtime)
        return SingleDecoder(self.model, self.runtime, cached=self.bound if mode == "single" else 0)

    def generate(
        self, requests: Sequence[GenerationRequest], done: Callable[[int, Reply], None] | None = None
    ) -> list[Reply]:
        """All replies, in the order of the requests. `done(i, reply)` is told of each when it finishes.

        Raises ContextError where a prompt leaves no room for a token.
        """
        out: list[Reply | None] = [None] * len(requests)
        # Longest first: a lack of memory shows at once, and the last to run are short.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
        with Scheduler(
            self, shared_prefix=common_beginning([r.prompt_ids for r in requests]), longest=longest
        ) as session:
            for i in order:
                session.submit(requests[i])
            while session.busy:
                for sequence in session.advance():
                    if sequence.error is not None:
                        raise sequence.error
                    if sequence.finish is not None:
                        i = order[sequence.number]
                        reply = out[i] = sequence.reply()
                        if done:
                            done(i, reply)
        return [r for r in out if r is not None]

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """The same reply as `generate([request])`, piece by piece. Closing the iterator stops the work."""
        with Scheduler(self, longest=len(request.prompt_ids) + request.max_new_tokens) as session:
            session.submit(request, streamed=True)
            while session.busy:
                for sequence in session.advance():
                    if sequence.error is not None:
                        raise sequence.error
                    yield sequence.take()  # empty, too: whoever listens can stop at any token

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


def common_beginning(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that several prompts all begin with, where that is worth computing apart; one at least is left."""
    if len(prompts) < 2:
        return ()
    shared = min(len(p) for p in prompts) - 1
    for a, b in pairwise(prompts):
        shared = next((i for i in range(shared) if a[i] != b[i]), shared)
    return tuple(prompts[0][:shared]) if shared >= SHARED else ()
