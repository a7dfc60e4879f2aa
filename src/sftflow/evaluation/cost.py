"""What asking costs: known in tokens before it begins, in seconds after a short probe of the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from sftflow.evaluation.side_by_side import Asker, Work, running
from sftflow.foundation.ranks import ranks
from sftflow.generation.engine import Engine

PROBE_TOKENS, PROBE_STEPS = 16, 3
USUAL = 0.5
"""of its limit a reply uses so much: a guess, told as one. SmolLM2-135M uses a third, the demo's base nearly all"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What all of it comes to.   seconds: about, and at most."""

    work: Work
    seconds: tuple[float, float]


def estimate(askers: Sequence[Asker]) -> Estimate:
    """Each model is probed on the beginnings of some of its own prompts."""
    by_engine: dict[int, list[Asker]] = {}
    for asker in askers:
        by_engine.setdefault(id(asker.assistant.engine), []).append(asker)
    total, about, most = Work(), 0.0, 0.0
    for asked in by_engine.values():
        work = sum((asker.left() for asker in asked), Work())
        total += work
        if work.replies:
            prompts = [r.prompt_ids for asker in asked for r in asker.requests.values()]
            read, step = rates(asked[0].assistant.engine, prompts or [(0,) * PROBE_TOKENS])
            about += work.read * read + USUAL * work.most * step
            most += work.read * read + work.most * step
    share = ranks().world
    return Estimate(work=total, seconds=(about / share, most / share))


def rates(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds for a token that is read, and for one that is generated beside as many others as will run."""
    some = [prompt[:PROBE_TOKENS] for prompt in prompts[: running(engine)]]
    engine.decode_mode(2 * PROBE_TOKENS)  # the proof, which takes its own time
    with closing(engine.decoder(longest=2 * PROBE_TOKENS)) as decoder:
        read = _seconds(lambda: decoder.add(some)) / sum(map(len, some))
        steps = [_seconds(lambda: decoder.step([prompt[-1] for prompt in some])) for _ in range(PROBE_STEPS)]
    return read, statistics.median(steps) / len(some)


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    work().amax().item()  # on a GPU it is only asked for until somebody looks
    return time.perf_counter() - began
