"""The one generation engine: batched decoding with a KV cache, the calculator inside the reply, streaming.

Evaluation, comparison, terminal chat and server all call it. Prompts of a batch are padded on the LEFT, so that all
of them write their next token at the same place of the cache; finished ones leave the batch (the cache is compacted).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Part
from sftflow.errors import ContextError
from sftflow.generate.calculator import calculate
from sftflow.runtime import Runtime

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. temperature 0 is greedy; top_k 0 and top_p 1 are off. stop_ids None: the format's own."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] | None = None
    stop_texts: tuple[str, ...] = ()
    use_python: bool = True


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished generation. ids: generated ids, the end token and what the calculator wrote included.
    text: what a person reads (text parts joined). seconds: from the start of its batch to its end."""

    ids: tuple[int, ...]
    text: str
    parts: tuple[Part, ...]
    finish_reason: FinishReason
    n_prompt: int
    n_generated: int
    seconds: float


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed reply, one per token: whole characters, or nothing. The last one carries the reply."""

    text: str
    finish_reason: FinishReason | None = None
    reply: Reply | None = None


@dataclass
class _Slot:
    """One running generation."""

    request: Request
    number: int
    stop: frozenset[int]
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None
    finish: FinishReason | None = None


class Engine:
    """Generates with one model and one format. Not re-entrant: one `generate` or `stream` at a time."""

    def __init__(self, model: Any, renderer: Renderer, runtime: Runtime, *, slots: int = 64) -> None:
        self.model, self.renderer, self.runtime, self.slots = model, renderer, runtime, slots
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        self.python = renderer.python_ids()
        self.stop = frozenset(renderer.stop_ids())

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Reply]:
        """All replies, in the order of the requests. `progress(k)` is told of every k replies that finish.

        Raises ContextError where a prompt leaves no room for a token.
        """
        out: list[Reply | None] = [None] * len(requests)
        # Prompts of like length together: little padding; longest first, so that a lack of memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        for start in range(0, len(order), self.slots):
            group = order[start : start + self.slots]
            began = time.perf_counter()
            for slot, _ in self._run([requests[i] for i in group]):
                if slot.finish is not None:
                    out[group[slot.number]] = self._reply(slot, time.perf_counter() - began)
                    if progress:
                        progress(1)
        return [r for r in out if r is not None]

    def stream(self, request: Request) -> Iterator[Delta]:
        """The same reply as `generate([request])`, piece by piece. Closing the iterator stops the work."""
        began = time.perf_counter()
        shown = ""
        for slot, _ in self._run([request]):
            parts = self._parts(slot.ids)
            text = "".join(p.text for p in parts if p.kind == "text")
            if slot.finish is None:
                # An unfinished character decodes to U+FFFD at the very end; wait for its last byte. A stop text may
                # be on its way in, too.
                text = _hold_back(text.rstrip("\ufffd"), request.stop_texts)
                new = text[len(shown) :] if text.startswith(shown) else ""
                shown += new
                yield Delta(new)  # empty, too: whoever listens can stop at any token
            else:
                reply = self._reply(slot, time.perf_counter() - began)
                yield Delta(reply.text[len(shown) :] if reply.text.startswith(shown) else "", slot.finish, reply)

    @torch.inference_mode()
    def choice_scores(self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt, the log-probability of each of its options as the very next token."""
        out: list[list[float]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.slots):
            group = order[start : start + self.slots]
            logits, *_ = self._prefill([list(prompts[i]) for i in group])
            logprobs = logits.log_softmax(-1)
            for row, i in enumerate(group):
                out[i] = [float(logprobs[row, o]) for o in options[i]]
        return out

    # ---- decoding

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        from transformers import DynamicCache

        device = self.model.device
        longest = max(len(p) for p in prompts)
        if longest >= self.context:
            raise ContextError("prompt", f"{longest} tokens do not fit a context of {self.context}", "shorten it")
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        with self.runtime.autocast():
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return logits.float(), cache, mask, positions[:, -1]

    @torch.inference_mode()
    def _step(self, tokens: list[int], cache: Any, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        with self.runtime.autocast():
            out = self.model(
                input_ids=torch.tensor(tokens, device=mask.device)[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return torch.as_tensor(out).float()

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[_Slot, int]]:
        """Decode a batch; yields every slot after each of its tokens, for the last time with `finish` set."""
        slots = [self._slot(i, r) for i, r in enumerate(requests)]
        with torch.inference_mode():
            logits, cache, mask, position = self._prefill([list(r.prompt_ids) for r in requests])
        while slots:
            tokens = []
            greedy = logits.argmax(-1).tolist()
            for row, slot in enumerate(slots):
                token = self._next_token(slot, logits[row], greedy[row])
                self._accept(slot, token)
                tokens.append(token)
                yield slot, token
            keep = [i for i, s in enumerate(slots) if s.finish is None]
            if not keep:
                return
            if len(keep) < len(slots):
                rows = torch.tensor(keep, device=mask.device)
                with torch.inference_mode():
                    cache.batch_select_indices(rows)
                mask, position = mask[rows], position[rows]
                slots, tokens = [slots[i] for i in keep], [tokens[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(slots), 1)], 1)
            position = position + 1
            logits = self._step(tokens, cache, mask, position)

    def _slot(self, number: int, request: Request) -> _Slot:
        stop = self.stop if request.stop_ids is None else request.stop_ids
        generator = None
        if request.temperature > 0:
            generator = torch.Generator().manual_seed(request.seed)  # its own, so that a batch mate changes nothing
        room = self.context - len(request.prompt_ids)
        if room < 1:
            fact = f"{len(request.prompt_ids)} tokens leave no room in a context of {self.context}"
            raise ContextError("prompt", fact, "shorten it")
        return _Slot(request, number, stop, generator)

    def _next_token(self, slot: _Slot, logits: torch.Tensor, greedy: int) -> int:
        if slot.forced:
            return slot.forced.popleft()
        if slot.generator is None:
            return greedy
        return sample(logits.cpu(), slot.request, slot.generator)

    def _accept(self, slot: _Slot, token: int) -> None:
        """Book a token: follow the calculator's protocol, see whether the reply has ended."""
        request = slot.request
        slot.ids.append(token)
        if self.python is not None and request.use_python and not slot.forced:
            start, end, output_start, output_end = self.python
            if token == start:
                slot.call = []
            elif token == end and slot.call is not None:
                source = self.renderer.tokenizer.decode(slot.call)
                result = calculate(source)
                slot.call = None
                if result is not None:
                    slot.forced.extend([output_start, *self.renderer.encode_plain(result), output_end])
            elif slot.call is not None:
                slot.call.append(token)
        room = min(request.max_new_tokens, self.context - len(request.prompt_ids))
        if token in slot.stop or (request.stop_texts and any(s in self._text(slot.ids) for s in request.stop_texts)):
            slot.finish = "stop"
        elif len(slot.ids) >= room:
            slot.finish = "length"

    # ---- text

    def _parts(self, ids: Sequence[int]) -> tuple[Part, ...]:
        """Generated ids as text, calculator calls and their results; control tokens themselves are not text."""
        decode = self.renderer.tokenizer.decode
        if self.python is None:
            return (Part("text", decode(list(ids), skip_special_tokens=True)),)
        start, end, output_start, output_end = self.python
        parts: list[Part] = []
        kind: Literal["text", "python", "python_output"] = "text"
        run: list[int] = []

        def close() -> None:
            if run:
                parts.append(Part(kind, decode(list(run), skip_special_tokens=True)))
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

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(p.text for p in self._parts(ids) if p.kind == "text")

    def _reply(self, slot: _Slot, seconds: float) -> Reply:
        parts = self._parts(slot.ids)
        text = "".join(p.text for p in parts if p.kind == "text")
        for stop in slot.request.stop_texts:
            text = text.split(stop, 1)[0]
        assert slot.finish is not None
        return Reply(
            ids=tuple(slot.ids),
            text=text,
            parts=parts,
            finish_reason=slot.finish,
            n_prompt=len(slot.request.prompt_ids),
            n_generated=len(slot.ids) - (1 if slot.ids and slot.ids[-1] in slot.stop else 0),
            seconds=seconds,
        )


def _hold_back(text: str, stops: Sequence[str]) -> str:
    """The part of a text that cannot turn out to be the beginning of a stop text."""
    hold = 0
    for stop in stops:
        for n in range(1, len(stop) + 1):
            if text.endswith(stop[:n]):
                hold = max(hold, n)
    return text[: len(text) - hold]


def sample(logits: torch.Tensor, request: Request, generator: torch.Generator) -> int:
    """Draw from softmax(logits / temperature), cut to the top_k likeliest and to the smallest set of mass top_p
    (nucleus sampling, Holtzman et al. 2020)."""
    logits = logits.float() / request.temperature
    if request.top_k > 0:
        kth = torch.topk(logits, min(request.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if request.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= request.top_p
        probabilities = probabilities.clone()
        probabilities[index[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
