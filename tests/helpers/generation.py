"""Requests with random prompts, and a model that runs out of memory when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from helpers.architectures import VOCABULARY
from sftflow.generation.request import GenerationRequest
from sftflow.generation.sequence import ReplyDecoder

Ids = list[int]


def draw(rng: Any, n: int) -> Ids:
    return rng.integers(0, VOCABULARY, n).tolist()


def text_of(decoder: ReplyDecoder, ids: Sequence[int]) -> str:
    return "".join(part.text for part in decoder.parts(ids) if part.kind == "text")


def requests_of(seed: int, n: int, **more: Any) -> list[GenerationRequest]:
    rng = np.random.default_rng(seed)
    return [
        GenerationRequest(
            prompt_ids=tuple(draw(rng, int(rng.integers(1, 60)))),
            max_new_tokens=int(rng.integers(1, 30)),
            use_python=False,
            **more,
        )
        for _ in range(n)
    ]


def ask(n: int, new: int, number: int = 0, **more: Any) -> GenerationRequest:
    ids = tuple(draw(np.random.default_rng(number), n))
    return GenerationRequest(prompt_ids=ids, max_new_tokens=new, stop_ids=frozenset(), use_python=False, **more)


@contextmanager
def failing(model: Any, fails: Callable[[Any], bool]) -> Iterator[None]:
    """The forward pass runs out of memory where `fails(input_ids)`."""
    own = model.forward

    def forward(input_ids: Any, **more: Any) -> Any:
        out = own(input_ids=input_ids, **more)  # it had begun to write into the cache
        if fails(input_ids):
            raise torch.OutOfMemoryError("out of memory")
        return out

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
