"""Who is let in when; what goes wrong stays with whom it concerns; a scheduler can be kept open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.generation import ask, draw, failing
from sftflow.evaluation.reply_checks import loops
from sftflow.generation.decoder import PackedDecoder
from sftflow.generation.engine import Engine
from sftflow.generation.kv_cache import ROOM
from sftflow.generation.loops import FIRST, LONGEST, ROUNDS, TOKENS, LoopWatch
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.scheduler import Scheduler


def finish(
    scheduler: Scheduler, done: Callable[[Any], None] = lambda sequences: None, turns: int = 2000
) -> dict[int, Reply]:
    out = {}
    for _ in range(turns):
        if not scheduler.busy:
            return out
        sequences = scheduler.advance()
        done(sequences)
        out.update({d.number: d.reply() for d in sequences if d.finish is not None})
    raise AssertionError("it does not end")


def test_a_long_prompt_does_not_keep_the_others_waiting(engine: Engine) -> None:
    requests = [ask(5, 60), ask(200, 5, 1, prompt_logprobs=0), ask(150, 5, 2), ask(12, 5, 3), ask(10, 5, 4)]
    wanted = engine.generate(requests)
    read: list[int] = []
    own = engine.model.forward

    def forward(input_ids: Any, **more: Any) -> Any:
        read[-1] += input_ids.shape[-1]
        return own(input_ids=input_ids, **more)

    engine.model.forward = forward
    first: dict[int, int] = {}
    try:
        with engine.scheduler(prompt_tokens=32) as scheduler:
            for request in requests:
                scheduler.submit(request)
            turn = 0

            def told(sequences: Any) -> None:
                nonlocal turn
                turn += 1
                read.append(0)
                if turn < 60:
                    assert sequences[0].number == 0  # it gets a token every time
                for sequence in sequences:
                    first.setdefault(sequence.number, turn)

            read.append(0)
            replies = finish(scheduler, told)
    finally:
        del engine.model.forward
    # 32 tokens of prompts, a free slot behind each packed row, and one token for each that runs
    assert max(read) <= 32 + 6 + 5
    assert [first[i] for i in range(5)] == sorted(first.values())  # first come, first served
    for number, reply in enumerate(wanted):
        assert replies[number].ids == reply.ids or reply.near_ties
    told_of = [t.logprob for t in replies[1].prompt_logprobs if t is not None]
    assert told_of == pytest.approx([t.logprob for t in wanted[1].prompt_logprobs if t is not None], abs=1e-4)


@pytest.mark.parametrize("prompt_tokens", [None, 64])
def test_a_prompt_that_fails_fails_alone(engine: Engine, prompt_tokens: int | None) -> None:
    giant = 17
    requests = [ask(5, 12), ask(9, 12, 1), ask(180, 12, 2), ask(7, 12, 3)]
    requests[2] = ask(180, 12, 2)
    bad = GenerationRequest(prompt_ids=(*requests[2].prompt_ids[:100], giant, giant, giant), max_new_tokens=5)
    wanted = engine.generate([requests[i] for i in (0, 1, 3)])
    errors: dict[int, Exception] = {}

    def told(sequences: Any) -> None:
        errors.update({d.number: d.error for d in sequences if d.error is not None})

    def is_giant(ids: Any) -> bool:
        return bool((ids[0].unfold(0, 3, 1) == giant).all(-1).any()) if ids.shape[-1] >= 3 else False

    with failing(engine.model, is_giant), engine.scheduler(prompt_tokens=prompt_tokens) as scheduler:
        scheduler.submit(requests[0])
        scheduler.advance()
        for request in (requests[1], bad, requests[3]):
            scheduler.submit(request)
        replies = finish(scheduler, told)
        assert list(errors) == [2] and isinstance(errors[2], torch.OutOfMemoryError)
        for number, reply in zip((0, 1, 3), wanted, strict=True):
            assert replies[number].ids == reply.ids
        again = scheduler.submit(requests[0])
        assert finish(scheduler)[again].ids == wanted[0].ids


def test_a_step_that_fails_ends_those_that_run_and_no_more(engine: Engine) -> None:
    small = Engine(engine.model, engine.renderer, engine.runtime, max_running=2)
    requests = [ask(5, 12), ask(9, 12, 1), ask(7, 12, 3)]
    (wanted,) = engine.generate(requests[2:])
    small.decode_mode()
    errors: list[int] = []
    steps = 0

    def fails(ids: Any) -> bool:
        nonlocal steps
        steps += 1
        return steps == 4

    with failing(engine.model, fails), small.scheduler() as scheduler:
        for request in requests:
            scheduler.submit(request)
        replies = finish(scheduler, lambda sequences: errors.extend(d.number for d in sequences if d.error is not None))
    assert errors == [0, 1] and replies[2].ids == wanted.ids
    with failing(engine.model, lambda ids: True), pytest.raises(torch.OutOfMemoryError):
        engine.generate(requests)


def test_cancelling_a_prompt_that_is_being_read(engine: Engine) -> None:
    with engine.scheduler(prompt_tokens=16) as scheduler:
        numbers = [scheduler.submit(ask(100, 5, i)) for i in range(2)]
        scheduler.advance()
        assert scheduler.running == 1
        scheduler.cancel(numbers[0])
        assert list(finish(scheduler)) == numbers[1:]


def test_a_scheduler_that_is_kept_open_does_not_grow(engine: Engine) -> None:
    """500 short requests after a long one: what the long one took is given back, and no more is taken."""

    def held() -> int:
        decoder: Any = scheduler._decoder
        assert isinstance(decoder, PackedDecoder)
        return sum(x[0].numel() for x in decoder.cache.layers.values())

    small = Engine(engine.model, engine.renderer, engine.runtime, max_running=8)
    rng = np.random.default_rng(0)
    sizes = []
    config = engine.model.config
    place = config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    with small.scheduler(prompt_tokens=64) as scheduler:
        scheduler.context = 4096  # the tiny model takes any length; only its promise ends at 256
        scheduler.submit(ask(900, 30))
        scheduler.submit(ask(5, 200, 1))
        for i in range(500):
            scheduler.submit(ask(int(rng.integers(1, 12)), int(rng.integers(1, 6)), i))
        finish(scheduler, lambda sequences: sizes.append(held()))
    assert max(sizes) >= 1024 * place  # the long one was there
    assert max(sizes[len(sizes) // 2 :]) <= 16 * ROOM * place  # rows are added a few at a time; its room is given back


def test_nothing_to_generate_is_a_reply_too(engine: Engine) -> None:
    (reply,) = engine.generate([ask(5, 0)])
    assert (reply.ids, reply.text, reply.finish_reason) == ((), "", "length")
    context = engine.context
    (full,) = engine.generate([ask(context, 0, prompt_logprobs=1)])
    assert len(full.prompt_logprobs) == context


def test_the_shared_beginning_is_told_too(engine: Engine, tiny_base: Path) -> None:
    shared = draw(np.random.default_rng(5), 30)
    requests = [
        GenerationRequest(prompt_ids=(*shared, 7 + i), max_new_tokens=2, prompt_logprobs=0, use_python=False)
        for i in range(3)
    ]
    for request, reply in zip(requests, engine.generate(requests), strict=True):
        (alone,) = engine.generate([request])
        got, wanted = ([t.logprob for t in r.prompt_logprobs if t] for r in (reply, alone))
        assert got == pytest.approx(wanted, abs=1e-4) and len(got) == 30


def test_loops_are_read_at_once_and_are_the_same_reply(engine: Engine) -> None:
    """Replies that go round in a loop, leave it, end in it, and begin at any time beside others."""
    requests = [ask(5 + 3 * n, 120 + n, n) for n in range(10)]
    wanted = engine.generate(requests)
    looping = sum(loops(r.ids) for r in wanted)
    calls = 0
    own = engine.model.forward

    def forward(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(*args, **more)

    engine.model.forward = forward
    try:
        found = engine.generate([replace(r, loops_at_once=True) for r in requests], running=4)
        few, calls = calls, 0
        engine.generate(requests, running=4)
    finally:
        del engine.model.forward
    assert [r.ids for r in found] == [r.ids for r in wanted] and [r.text for r in found] == [r.text for r in wanted]
    assert looping and few < calls


@given(st.lists(st.integers(0, 2), max_size=150))
def test_a_loop_is_what_a_plain_search_finds(ids: list[int]) -> None:
    watch = LoopWatch()
    for token in ids:
        watch.add(token)
    n = len(ids)
    periods = [
        p
        for p in range(1, LONGEST + 1)
        if n >= max(ROUNDS * p, TOKENS)
        and all(ids[-i] == ids[-i - p] for i in range(1, max(ROUNDS * p, TOKENS) - p + 1))
    ]
    wanted = [ids[n - periods[0] :][i % periods[0]] for i in range(FIRST)] if periods else []
    assert watch.guess(1000) == wanted
