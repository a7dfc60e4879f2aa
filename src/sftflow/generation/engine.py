"""The one generation engine: continuous batching, the calculator inside the reply, streaming.

Evaluation, comparison, terminal chat and server all call it. One reply, in the order in which it is read:

    GenerationRequest (request) -> Engine.generate or .stream -> Scheduler (scheduler): prompts in, a token for each
    that runs -> decoder: its logits -> constraint: which may come -> sampling: the token
    -> ReplySequence (sequence): text, calculator, end -> detokenize: the text piece by piece -> Delta, Reply (request)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from sftflow.chat.render import Renderer
from sftflow.foundation.runtime import Runtime
from sftflow.foundation.sequences import common_prefix
from sftflow.generation.check_decoder import DecodeMode, Decoder, find_decode_mode, find_short_cuts, make_decoder
from sftflow.generation.constraint import Grammars
from sftflow.generation.llama import LlamaStep
from sftflow.generation.onednn import Forwards
from sftflow.generation.request import Delta, GenerationRequest, Reply
from sftflow.generation.scheduler import Scheduler
from sftflow.generation.sequence import ReplyDecoder
from sftflow.packing.length_limits import length_limit

SHARED = 16
"""a beginning that all prompts have in common is computed once if it has at least so many tokens"""


class Engine:
    """Generates with one model and one format. Not re-entrant: one scheduler at a time.

    max_running: replies that are generated side by side.   tick: called before every forward pass; what it raises ends
    the work.   context: the longest sequence that the model takes, prompt and reply together.   length_limit: the
    longest in which a token depends on the tokens before it alone (see `packing.length_limits`); longer ones are
    generated one after another.   grammars: what replies can be held to.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        runtime: Runtime,
        *,
        max_running: int = 32,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.renderer, self.runtime, self.max_running = model, renderer, runtime, max_running
        self.tick = tick or (lambda: None)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        self.reply_decoder = ReplyDecoder(renderer)
        size = int(model.get_input_embeddings().weight.shape[0])
        self.grammars = Grammars(renderer.tokenizer, self.reply_decoder.control, size)
        limit = length_limit(model)
        self.length_limit = self.context if limit is None else min(self.context, limit[0])
        self._modes: dict[bool, DecodeMode] = {}
        self._forwards: Forwards | None = None
        self._next_step: LlamaStep | None = None

    def decode_mode(self, longest: int | None = None) -> DecodeMode:
        """How this model is decoded where no sequence is longer than `longest` tokens (None: than the context allows);
        found out once. Raises CheckpointError where the model cannot be computed."""
        short = (self.context if longest is None else longest) <= self.length_limit
        if short not in self._modes:
            # Beyond the limit a neighbour's length would change a row's numbers, so each is computed alone.
            modes: list[DecodeMode] = ["packed", "padded", "single"] if short else ["single"]
            self._modes[short] = find_decode_mode(self.model, self.runtime, modes)
            if self._modes[short] == "packed":
                self._forwards, self._next_step = find_short_cuts(self.model, self.runtime)
        return self._modes[short]

    def decoder(self, shared_prefix: Sequence[int] = (), longest: int | None = None) -> Decoder:
        """The fastest decoder that is right for this model. shared_prefix: ids that every prompt will begin with.
        longest: tokens that the longest sequence may grow to; None: as many as the context has."""
        return make_decoder(
            self.decode_mode(longest),
            self.model,
            self.runtime,
            shared_prefix=shared_prefix,
            forwards=self._forwards,
            next_step=self._next_step,
            length_limit=self.length_limit,
        )

    def scheduler(
        self,
        *,
        shared_prefix: Sequence[int] = (),
        longest: int | None = None,
        prompt_tokens: int | None = None,
        running: int | None = None,
    ) -> Scheduler:
        """Replies that run side by side, for those who submit requests while others run; to be used in a `with`.

        shared_prefix, longest: see `decoder`.   prompt_tokens: see `Scheduler`.   running: in place of `max_running`.
        """
        return Scheduler(
            self.decoder(shared_prefix, longest),
            self.reply_decoder,
            context=self.context,
            max_running=running or self.max_running,
            prompt_tokens=prompt_tokens,
            tick=self.tick,
        )

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        done: Callable[[int, Reply], None] | None = None,
        *,
        running: int | None = None,
    ) -> list[Reply]:
        """All replies, in the order of the requests. `done(i, reply)` is told of each when it finishes.

        running: so many side by side, in place of `max_running`.
        Raises ContextError where a prompt leaves no room for a token.
        """
        out: list[Reply | None] = [None] * len(requests)
        # Longest first: a lack of memory shows at once, and the last to run are short.
        order = sorted(range(len(requests)), key=lambda i: (-requests[i].max_new_tokens, -len(requests[i].prompt_ids)))
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
        shared_prefix = shared_beginning([r.prompt_ids for r in requests])
        with self.scheduler(shared_prefix=shared_prefix, longest=longest, running=running) as scheduler:
            for i in order:
                scheduler.submit(requests[i])
            while scheduler.busy:
                for sequence in scheduler.advance():
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
        with self.scheduler(longest=len(request.prompt_ids) + request.max_new_tokens) as scheduler:
            scheduler.submit(request, streamed=True)
            while scheduler.busy:
                for sequence in scheduler.advance():
                    if sequence.error is not None:
                        raise sequence.error
                    yield sequence.take()  # empty, too: whoever listens can stop at any token

    def choice_scores(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[float]]]:
        """(number of a prompt, log-probability of each of its options as the very next token), as they are known."""
        # Prompts that begin alike side by side: what they share is computed once.
        order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
        decoder = self.decoder(shared_beginning(prompts), max(map(len, prompts), default=0))
        try:
            for start in range(0, len(order), self.max_running):
                self.tick()
                group = order[start : start + self.max_running]
                logprobs = decoder.scores([prompts[i] for i in group]).log_softmax(-1)
                for row, i in enumerate(group):
                    yield i, [float(logprobs[row, o]) for o in options[i]]
        finally:
            decoder.close()


def shared_beginning(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that several prompts all begin with, where that is worth computing apart; each keeps at least one."""
    if len(prompts) < 2:
        return ()
    rows = [tuple(p) for p in prompts]
    n = min(min(common_prefix(a, b) for a, b in pairwise(rows)), min(map(len, rows)) - 1)
    return rows[0][:n] if n >= SHARED else ()
