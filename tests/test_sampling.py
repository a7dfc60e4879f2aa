"""Sampling against transformers' own processors; log-probabilities against the model's own forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.architectures import ARCHITECTURES, FP32, stateful, tiny
from helpers.generation import draw as draw_ids
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest
from sftflow.generation.sampling import Sampler, choose, draw, warped

VOCABULARY = 50


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    loaded = load_assistant(str(tiny_base))
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return loaded


def request(**more: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt_ids": (1, 2, 3), "temperature": 1.0} | more))


def scores_of(logits: torch.Tensor, ask: GenerationRequest, generated: list[int]) -> torch.Tensor:
    sampler = Sampler(ask)
    for token in generated:
        sampler.note(token)
    return warped(logits[None], [sampler])[0]


ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    ids,
    ids,
    st.floats(0.1, 3),
    st.integers(0, VOCABULARY + 5),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0.3, 3),
)
def test_the_distribution_is_that_of_transformers(
    seed: int,
    prompt: list[int],
    generated: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
) -> None:
    import transformers as t

    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    processors: list[Any] = [t.RepetitionPenaltyLogitsProcessor(repetition), t.TemperatureLogitsWarper(temperature)]
    processors += [t.TopKLogitsWarper(top_k)] if top_k else []
    processors += [t.TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted, before = logits[None].clone(), None
    for processor in [*processors, t.MinPLogitsWarper(min_p)]:
        before, wanted = wanted, processor(torch.tensor([[*prompt, *generated]]), wanted)
        if isinstance(processor, t.TopPLogitsWarper):  # at the very border rounding decides, in theirs and in ours
            ordered = before.softmax(-1).sort(descending=True).values.cumsum(-1)
            assume(float((ordered - top_p).abs().min()) > 1e-5)
    assert before is not None
    shares = before.softmax(-1)
    assume(float((shares - min_p * shares.max()).abs().min()) > 1e-7)
    ask = request(
        prompt_ids=tuple(prompt),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
    )
    got = scores_of(logits, ask, generated)
    torch.testing.assert_close(got.softmax(-1), wanted[0].softmax(-1), atol=1e-6, rtol=1e-4)
    assert torch.equal(got.isinf(), wanted[0].isinf())


@given(st.integers(0, 10**6), ids, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalties(seed: int, generated: list[int], presence: float, frequency: float) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c: how often j was generated; the prompt does not count."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    ask = request(presence_penalty=presence, frequency_penalty=frequency)
    got = scores_of(logits, ask, generated)
    for j in range(VOCABULARY):
        c = generated.count(j)
        assert float(got[j]) == pytest.approx(float(logits[j]) - c * frequency - (c > 0) * presence, abs=1e-5)


def test_penalties_hold_for_greedy_replies_too(assistant: Any) -> None:
    plain = GenerationRequest(prompt_ids=(5, 6, 7), max_new_tokens=40, stop_ids=frozenset(), use_python=False)
    processors = {"repetition_penalty": 1.5}
    (reply,) = assistant.engine.generate([replace(plain, **processors)])
    prompt = torch.tensor([plain.prompt_ids])
    wanted = assistant.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        **processors,
    )[0, 3:]
    assert reply.ids == tuple(wanted.tolist())
    (never_twice,) = assistant.engine.generate([replace(plain, presence_penalty=1e4)])
    assert len(set(never_twice.ids)) == 40


def test_draws_follow_the_distribution_and_the_order_of_ids() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.0, 0.3]]).log()
    assert [draw(scores, [u])[0] for u in (0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-12)] == [0, 0, 1, 1, 3, 3]
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    found = draw(scores.expand(1000, -1), grid)
    assert [found.count(i) for i in range(4)] == [200, 500, 0, 300]
    last = torch.tensor([[0.0, -math.inf]])
    assert draw(last, [math.nextafter(1, 0)]) == [0]  # never an id that is cut off


def test_a_row_does_not_hang_on_its_neighbours() -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    asks = [
        request(seed=1),
        request(temperature=0.0),
        request(seed=3, top_k=4, top_p=0.7),
        request(temperature=0.0, frequency_penalty=1.0),
        request(seed=5, min_p=0.1, repetition_penalty=1.2),
    ]
    together, _ = choose(logits, [Sampler(a) for a in asks])
    assert together == [choose(logits[i : i + 1], [Sampler(a)])[0][0] for i, a in enumerate(asks)]


def test_seeds_of_either_sign_are_different() -> None:
    assert Sampler(request(seed=1)).uniform() != Sampler(request(seed=-1)).uniform()


def test_sampled_replies_are_the_same_alone_and_in_a_full_batch(assistant: Any) -> None:
    rng = np.random.default_rng(0)
    asks = [
        GenerationRequest(
            prompt_ids=tuple(draw_ids(rng, int(rng.integers(1, 40)))),
            max_new_tokens=16,
            seed=i,
            **[{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3, "min_p": 0.05}][i % 3],
        )
        for i in range(24)
    ]
    together = assistant.engine.generate(asks)
    for ask, reply in zip(asks, together, strict=True):
        assert assistant.engine.generate([ask])[0].ids == reply.ids


def check_logprobs(model: Any, ask: GenerationRequest, reply: Any) -> None:
    """Against one forward pass over prompt and reply, no cache."""
    whole = [*ask.prompt_ids, *reply.ids]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].float().log_softmax(-1)
    told = [*reply.prompt_logprobs, *reply.logprobs]
    assert len(told) == len(whole) and told[0] is None
    for at, (token, got) in enumerate(zip(whole[1:], told[1:], strict=True)):
        n = ask.prompt_logprobs if at + 1 < len(ask.prompt_ids) else ask.logprobs
        assert got.id == token and len(got.top) == n
        assert got.logprob == pytest.approx(float(wanted[at, token]), abs=2e-4)
        values = [v for _, v in got.top]
        assert values == pytest.approx(wanted[at].topk(n).values.tolist(), abs=2e-4)
        assert values == pytest.approx([float(wanted[at, i]) for i, _ in got.top], abs=2e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "GPT2", "Mamba", "RecurrentGemma", "Phimoe"])
def test_logprobs_are_the_models_own(name: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftflow.checkpoint import load_assistant

    monkeypatch.setattr("sftflow.generation.scheduler.EVERY", 7)  # so that prompts are read in several parts
    model = tiny(name) if name in ARCHITECTURES else stateful(name)
    engine = Engine(model, load_assistant(str(tiny_base)).renderer, FP32, max_running=4)
    rng = np.random.default_rng(1)
    shared = draw_ids(rng, 20)
    asks = [
        GenerationRequest(
            prompt_ids=tuple([*shared, *draw_ids(rng, n)]),
            max_new_tokens=5,
            temperature=float(n % 2),
            frequency_penalty=0.5,
            stop_ids=frozenset(),
            use_python=False,
            logprobs=n,
            prompt_logprobs=2,
        )
        for n in (1, 4, 2)
    ]
    for ask, reply in zip(asks, engine.generate(asks), strict=True):
        check_logprobs(model, ask, reply)
    (only,) = engine.generate([replace(asks[0], max_new_tokens=0)])
    assert (only.ids, only.finish_reason) == ((), "length")
    assert len(only.prompt_logprobs) == 21
    (none,) = engine.generate([replace(asks[0], logprobs=None, prompt_logprobs=None)])
    assert none.logprobs == none.prompt_logprobs == ()


def test_what_the_calculator_writes_has_the_models_logprobs(assistant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens are dictated, a call; what follows it is the engine's."""
    engine, renderer = assistant.engine, assistant.renderer
    start, end, out_start, out_end = renderer.python_ids()
    dictated = [start, *renderer.encode_plain("48/2"), end]
    said = list(dictated)

    def dictate(logits: Any, samplers: Any) -> Any:
        tokens, near = choose(logits, samplers)
        return [said.pop(0)] if said else tokens, near

    monkeypatch.setattr("sftflow.generation.scheduler.choose", dictate)
    ask = GenerationRequest(
        prompt_ids=(5, 6, 7), max_new_tokens=16, stop_ids=frozenset(), logprobs=2, prompt_logprobs=1
    )
    deltas = list(engine.stream(ask))
    reply = deltas[-1].reply
    assert reply is not None
    result = (out_start, *renderer.encode_plain("24"), out_end)
    assert reply.ids[: len(dictated) + len(result)] == (*dictated, *result)
    check_logprobs(assistant.model, ask, reply)
    assert tuple(t for d in deltas for t in d.tokens) == reply.logprobs
