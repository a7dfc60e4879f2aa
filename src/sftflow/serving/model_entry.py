"""A model that is served, and what one request asks of it."""

from __future__ import annotations

import functools
import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftflow.chat.tool_format import learn_calls
from sftflow.chat.tool_parser import CallFormat
from sftflow.generation.request import GenerationRequest
from sftflow.serving.logprobs import TokenTable
from sftflow.serving.sampling import own_sampling
from sftflow.serving.schemas import SamplingBody

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant
    from sftflow.serving.engine_thread import Worker


class Served:
    """One model under its name: its worker, and what is learnt of its tokenizer and format when first needed."""

    def __init__(self, name: str, worker: Worker) -> None:
        self.name, self.worker = name, worker
        self.table = TokenTable(self.assistant.tokenizer)

    @property
    def assistant(self) -> Assistant:
        return self.worker.assistant

    @property
    def context(self) -> int:
        return self.assistant.engine.context

    @functools.cached_property
    def calls(self) -> CallFormat | None:
        return learn_calls(self.assistant.renderer)

    @functools.cached_property
    def silent(self) -> frozenset[int]:
        """Ids that stand in no reply's text: the control tokens."""
        return frozenset(self.assistant.renderer.special.values())


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn: its own values, else the checkpoint's."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_texts: tuple[str, ...]
    stop_ids: frozenset[int] | None

    @classmethod
    def of(cls, assistant: Assistant, body: SamplingBody) -> SamplingParams:
        own = own_sampling(assistant)
        temperature = own["temperature"] if body.temperature is None else body.temperature
        top_p = own["top_p"] if body.top_p is None else body.top_p
        return cls(
            temperature=temperature if temperature >= 1e-4 else 0.0,  # the limit of ever smaller ones
            top_p=max(top_p, 1e-6),
            top_k=max(own["top_k"] if body.top_k is None else body.top_k, 0),  # -1 is vLLM's "off"
            min_p=own["min_p"] if body.min_p is None else body.min_p,
            repetition_penalty=own["repetition_penalty"]
            if body.repetition_penalty is None
            else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            stop_texts=body.stops,
            stop_ids=frozenset() if body.ignore_eos else None,
        )

    def requests(
        self, body: SamplingBody, prompt: tuple[int, ...], limit: int, *, logprobs: int | None,
        prompt_logprobs: int | None = None, use_python: bool = True,
    ) -> list[GenerationRequest]:  # fmt: skip
        """n requests for one prompt, each with a seed of its own."""
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt_ids=prompt,
                max_new_tokens=limit,
                seed=derived_seed(seed, i),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                use_python=use_python,
                **vars(self),
            )
            for i in range(body.n or 1)
        ]


def derived_seed(seed: int, choice: int) -> int:
    """The seed of choice number `choice`; the first one's is the request's own, so that n=1 is the beginning of n=2.

    >>> derived_seed(7, 0)
    7
    """
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8]) >> 1
