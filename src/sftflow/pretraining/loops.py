"""Loops: what a small model falls into when it takes its likeliest token again and again.

`against_loops` changes what a base is trained on, `escape_loops` trains it on ways out of the loops that it falls into,
`continuations` measures how it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.chat.format import builtin_format
from sftflow.chat.render import Renderer
from sftflow.foundation.errors import RunError
from sftflow.foundation.runtime import Runtime
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest
from sftflow.packing.pack import Example
from sftflow.recipe import Schedule, Train
from sftflow.training.batch_plan import RowPlan
from sftflow.training.trainer import Trainer, resting
from sftflow.training.training_run import Listener

REPEATED, NEAR = 4, 64
"""what counts as said again: so many tokens in the same order, within so many"""
PROMPTS, PROMPT, LENGTH = 50, 32, 128
"""continuations: how many are measured, the tokens that each begins with, the tokens that it goes on for"""
LONGEST_PERIOD, SHORTEST_LOOP = 32, 12
SAMPLES, SAMPLE = 10, 60
"""the continuations that the card shows, drawn at temperature 1, and their length"""
ROUNDS, STEPS, RATE, BEGINNINGS, WAYS_OUT = 6, 30, 0.4, 240, 48
"""`escape_loops`; WAYS_OUT of one continuation at most"""


def against_loops(rows: list[Example], seed: int) -> list[Example]:
    """The rows, changed so that they do not teach to say the same again.

    Left to its likeliest token a small model repeats itself for ever: each repetition makes the next one likelier.
    In half of the rows three stretches are said again and again before the text goes on: 1 to 32 tokens, 2 to 5 times,
    with some tokens missing; the row's end falls off. Repetitions are not supervised, those made here and those of the
    text (`REPEATED` tokens that came in the same order within the last `NEAR`), so that what is supervised there is the
    way out. (Li et al. 2023, "Repetition In Repetition Out", hide repetitions, too.)
    """
    rng = np.random.default_rng([seed, 1])
    out = []
    for row in rows:
        ids, n = row.ids, len(row.ids)
        made = np.zeros(n, bool)
        for _ in range(3 if n > 128 and rng.random() < 0.5 else 0):
            size = int(2 ** rng.uniform(0, 5.05))
            end = int(rng.integers(size, n - 64))
            again = np.tile(ids[end - size : end], max(int(rng.integers(1, 5)), math.ceil(6 / size) - 1))
            again = again[rng.random(len(again)) < rng.choice([0.9, 1.0])]
            ids = np.concatenate([ids[:end], again, ids[end:]])[:n]
            made = np.concatenate([made[:end], np.ones(len(again), bool), made[end:]])[:n]
        hidden = made | repeats(ids)
        hidden[-1] = False  # rows of one length are computed fastest
        out.append(Example(ids=ids, mask=row.mask * ~hidden))
    return out


def repeats(ids: NDArray[np.generic]) -> NDArray[np.bool_]:
    """(n,) whether this token and the REPEATED - 1 before it came in this order within the last NEAR tokens."""
    found, last = np.zeros(len(ids), bool), dict[tuple[int, ...], int]()
    listed = ids.tolist()
    for i in range(REPEATED - 1, len(listed)):
        stretch = tuple(listed[i - REPEATED + 1 : i + 1])
        found[i] = i - last.get(stretch, -NEAR - 1) <= NEAR
        last[stretch] = i
    return found


def escape_loops(
    model: Any, tokenizer: Any, rows: list[Example], settings: Train, runtime: Runtime, listener: Listener
) -> None:
    """A short training of `model` on ways out of its own loops, beside rows of text: ROUNDS times STEPS steps.

    settings: of the training before; the rate is RATE of its at first, and falls from round to round.
    """
    schedule = Schedule(kind="linear", warmup=0.05, warmdown=0.5)
    for number in range(ROUNDS):
        found = own_loops(model, tokenizer, rows, runtime, seed=settings.seed + number)
        if not found:
            return
        listener.say(f"ways out of its own loops: {number + 1} of {ROUNDS}")
        lr = RATE * settings.peak_lr * (1 - number / ROUNDS)
        keys = {"lr": lr, "schedule": schedule, "steps": STEPS, "compile": False, "seed": settings.seed + number}
        round_settings = settings.model_copy(update=keys)
        for log in Trainer(model, _Mixed(rows, found, round_settings), round_settings, runtime, ["text"]):
            if log.skipped:
                raise RunError(f"step {log.step}", "the loss is not finite", "lower the rate")


class _Mixed(RowPlan):
    """Steps of which one half are rows of text, and one half each the ways out of one continuation."""

    def __init__(self, rows: list[Example], found: list[list[Example]], settings: Train) -> None:
        super().__init__(rows, settings)
        self.found = found

    def step_rows(self, step: int) -> list[list[Example]]:
        half = max(1, self.rows_per_step // 2)
        ways = [self.found[(step * half + i) % len(self.found)] for i in range(half)]
        return super().step_rows(step)[:half] + ways


def own_loops(model: Any, tokenizer: Any, rows: list[Example], runtime: Runtime, *, seed: int) -> list[list[Example]]:
    """The ways out of greedy continuations of BEGINNINGS rows, by continuation.

    A way out is the text up to a token that the model repeats, and in its place another, drawn from the model's own
    distribution without it; that one alone is supervised. So nothing is taught but not to repeat: the odds of all other
    tokens among each other stay. Those of one continuation begin alike, so all are computed in one pass over it.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = rng.choice(len(rows), min(BEGINNINGS, len(rows)), replace=False)
    prompts = [tuple(rows[i].ids[:PROMPT].tolist()) for i in chosen]
    replies = greedy_of(model, tokenizer, runtime, prompts)
    out = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = np.array(prompt + reply)
        places = np.flatnonzero(repeats(ids) & (np.arange(len(ids)) >= len(prompt)))
        if not len(places):
            continue
        places = np.sort(rng.choice(places, min(WAYS_OUT, len(places)), replace=False))
        with resting(model), torch.no_grad(), runtime.autocast():
            logits = model(torch.tensor(ids[None], device=runtime.device)).logits[0, places - 1].float()
        logits[torch.arange(len(places)), torch.tensor(ids[places])] = -torch.inf
        cumulative = logits.softmax(-1).cpu().double().cumsum(-1).numpy()
        drawn = [int(np.searchsorted(c, rng.random() * c[-1], side="right")) for c in cumulative]
        masks = [np.zeros(place + 1, np.int8) for place in places]
        for mask in masks:
            mask[-1] = 1
        out.append([Example(ids=np.append(ids[: len(m) - 1], i), mask=m) for m, i in zip(masks, drawn, strict=True)])
    return out


def greedy_of(
    model: Any, tokenizer: Any, runtime: Runtime, prompts: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The likeliest LENGTH tokens after each prompt, or as many as the context has."""
    with resting(model):
        engine = _engine(model, tokenizer, runtime)
        return [reply.ids for reply in engine.generate([_go_on(engine, prompt, LENGTH) for prompt in prompts])]


def _engine(model: Any, tokenizer: Any, runtime: Runtime) -> Engine:
    """A format that adds nothing: documents go on as documents."""
    return Engine(model.eval(), Renderer(tokenizer, builtin_format("alpaca")), runtime, max_running=64)


def _go_on(engine: Engine, prompt: tuple[int, ...], n: int, **keys: Any) -> GenerationRequest:
    room = max(1, min(n, engine.context - len(prompt)))
    return GenerationRequest(prompt_ids=prompt, max_new_tokens=room, stop_ids=frozenset(), use_python=False, **keys)


def continuations(model: Any, tokenizer: Any, runtime: Runtime, texts: Sequence[Iterable[str]]) -> dict[str, Any]:
    """How the model goes on after the first PROMPT tokens of held-out documents, taken from the texts in turn.

    looping: the share of greedy continuations that end in a loop.   distinct_3: of one's runs of three tokens the share
    that are different ones, the mean over all.   samples: (beginning, continuation), drawn at temperature 1.
    """
    prompts: list[tuple[int, ...]] = []
    sources = [iter(text) for text in texts]
    while sources and len(prompts) < PROMPTS:
        for source in list(sources):
            ids = next((i for d in source if len(i := tokenizer(d).input_ids) > PROMPT), None)
            if ids is None:
                sources.remove(source)
            else:
                prompts.append(tuple(ids[:PROMPT]))
    prompts = prompts[:PROMPTS]
    greedy = greedy_of(model, tokenizer, runtime, prompts)
    few = prompts[:SAMPLES]
    with resting(model):
        engine = _engine(model, tokenizer, runtime)
        drawn = engine.generate([_go_on(engine, p, SAMPLE, temperature=1.0, seed=i) for i, p in enumerate(few)])
    return {
        "prompts": len(prompts),
        "looping": round(sum(map(ends_in_a_loop, greedy)) / max(1, len(greedy)), 3),
        "distinct_3": round(sum(map(distinct_3, greedy)) / max(1, len(greedy)), 3),
        "samples": [(tokenizer.decode(p, skip_special_tokens=True), r.text) for p, r in zip(few, drawn, strict=True)],
    }


def ends_in_a_loop(ids: Sequence[int]) -> bool:
    """Whether the end of it is one stretch of at most LONGEST_PERIOD tokens said three times or more, of SHORTEST_LOOP
    tokens at least."""
    for period in range(1, LONGEST_PERIOD + 1):
        size = max(3 * period, SHORTEST_LOOP)
        if len(ids) >= size and all(ids[-i] == ids[-i - period] for i in range(1, size - period + 1)):
            return True
    return False


def distinct_3(ids: Sequence[int]) -> float:
    """Different runs of three tokens / all runs of three; 1 where there are none."""
    runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return len(set(runs)) / len(runs) if runs else 1.0
