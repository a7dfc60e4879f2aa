"""Log-probabilities, plain completions and several choices, against the model's own forward pass."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from helpers.serving import ASK, DRAW, local, own, refusal, request, running, twin
from sftflow.checkpoint import Assistant
from sftflow.generation.sampling import derived_seed
from sftflow.serving import api
from sftflow.serving.logprobs import TextLogprobs
from sftflow.serving.responses import EVENT, PLAIN, slices

PROMPT = "the cat sat on 🙂 the mät"


@pytest.fixture(scope="module")
def client(assistant: Assistant) -> Iterator[openai.OpenAI]:
    with running(api.make_app({"tiny": assistant})) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20)


def reference(assistant: Assistant, ids: Any) -> torch.Tensor:
    """(n, vocabulary): log-probabilities of the token after each."""
    with torch.no_grad():
        return twin(assistant.name).model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def test_chat_logprobs_are_the_models_own(client: openai.OpenAI, assistant: Assistant) -> None:
    reply = own(assistant, 20)
    prompt = request(assistant, 1).prompt_ids
    wanted = reference(assistant, (*prompt, *reply.ids))
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=20, logprobs=True, top_logprobs=3, **DRAW
    )
    content = got.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    ids = [i for i in reply.ids if i not in assistant.renderer.special.values()]
    assert len(content) == len(ids)
    places = [n for n, i in enumerate(reply.ids) if i in ids]
    for token, n in zip(content, places, strict=True):
        row = wanted[len(prompt) + n - 1]
        assert token.logprob == pytest.approx(float(row[reply.ids[n]]), abs=1e-4)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert bytes(token.bytes or []).decode("utf-8", "replace") == token.token
    assert b"".join(bytes(t.bytes or []) for t in content).decode("utf-8", "replace") == reply.text
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=20, logprobs=True, top_logprobs=3, stream=True, **DRAW
    )
    pieces = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert [p.model_dump() for p in pieces] == [c.model_dump() for c in content]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [False, True])
def test_the_prompts_log_probabilities(
    client: openai.OpenAI, assistant: Assistant, max_tokens: int, as_ids: bool
) -> None:
    """What lm-evaluation-harness asks for: echo, logprobs, and one token of which it throws the rest away."""
    ids = assistant.plain_ids(PROMPT)
    prompt: Any = list(ids) if as_ids else PROMPT
    got = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0, seed=1
    )
    choice = got.choices[0]
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    lengths = {len(told.tokens), len(told.token_logprobs), len(told.top_logprobs), len(told.text_offset)}
    assert len(lengths) == 1 and len(told.tokens) == len(ids) + (got.usage.completion_tokens if got.usage else -1)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    wanted = reference(assistant, ids)
    for n in range(1, len(ids)):
        row = wanted[n - 1]
        assert told.token_logprobs[n] == pytest.approx(float(row[ids[n]]), abs=1e-4)
        top = told.top_logprobs[n]
        assert top is not None
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        is_greedy = int(row.argmax()) == ids[n]
        assert (told.token_logprobs[n] == max(top.values())) == is_greedy
        if is_greedy:
            assert top[told.tokens[n]] == told.token_logprobs[n]
    shown = PROMPT if not as_ids else assistant.tokenizer.decode(list(ids), skip_special_tokens=False)
    assert choice.text.startswith(shown)
    assert choice.finish_reason == ("length" if max_tokens in (0, 1) else choice.finish_reason)
    at = told.tokens.index(" sat") if " sat" in told.tokens else None
    if at is not None:
        assert choice.text[told.text_offset[at] :].startswith(" sat")
    assert told.text_offset == sorted(told.text_offset) and told.text_offset[-1] <= len(choice.text)


def test_the_emoji_is_one_character_of_the_offsets(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="🙂b", echo=True, logprobs=0, max_tokens=0).choices[0]
    told = choice.logprobs
    assert choice.text == "🙂b" and told is not None and told.text_offset and told.tokens
    assert told.tokens[-1] == "b" and told.text_offset[-1] == 1


def test_several_prompts_and_choices_are_in_order_and_as_if_alone(client: openai.OpenAI) -> None:
    def create(prompt: Any, n: int) -> Any:
        return client.completions.create(model="tiny", prompt=prompt, n=n, max_tokens=8, temperature=1, seed=3)

    together = create(["the cat", "what is"], 2)
    assert [c.index for c in together.choices] == [0, 1, 2, 3]
    alone = [create("the cat", 2), create("what is", 2)]
    assert [c.text for c in together.choices] == [c.text for one in alone for c in one.choices]
    assert len({c.text for c in together.choices[:2]}) == 2  # a seed of its own each
    assert create("the cat", 1).choices[0].text == together.choices[0].text
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    ids = create([[5, 6, 7], [8, 9]], 1)
    assert [c.text for c in ids.choices] == [create([5, 6, 7], 1).choices[0].text, create([8, 9], 1).choices[0].text]


def test_choices_are_streamed_side_by_side(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": ASK, "n": 3, "max_tokens": 12, **DRAW}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].index for c in chunks[:3]] == [0, 1, 2]
    assert all(c.choices[0].delta.role == "assistant" for c in chunks[:3])
    for index, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason
    order = [c.choices[0].index for c in chunks[3:-1]]
    assert order != sorted(order)
    assert len({c.message.content for c in whole.choices}) > 1
    assert derived_seed(5, 1) != derived_seed(5, 2) != derived_seed(6, 2)


def test_a_streamed_completion_is_the_plain_one(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "tiny", "prompt": ["the cat", PROMPT], "echo": True, "logprobs": 1, "max_tokens": 9, "stop": ["q"],
        **DRAW,
    }  # fmt: skip
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    assert {c.object for c in chunks} == {"text_completion"} and len({c.id for c in chunks}) == 1
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [x for c in mine if c.logprobs for x in getattr(c.logprobs, key) or []]
            assert joined == getattr(choice.logprobs, key)
    plain = client.completions.create(**{**options, "echo": None, "logprobs": None})
    stream = client.completions.create(**{**options, "echo": None, "logprobs": None}, stream=True)
    texts = {0: "", 1: ""}
    for c in stream:
        texts[c.choices[0].index] += c.choices[0].text
    assert [texts[0], texts[1]] == [c.text for c in plain.choices]


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, assistant: Assistant) -> None:
    def text(**options: Any) -> str | None:
        extra = {k: options.pop(k) for k in ("top_k", "min_p", "repetition_penalty", "ignore_eos") if k in options}
        got = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=24, extra_body=extra, **{**DRAW, **options}
        )
        return got.choices[0].message.content

    greedy = own(assistant, 24, temperature=0.0).text
    assert text(temperature=0) == greedy
    assert text(top_k=1) == text(min_p=1) == greedy
    assert text(repetition_penalty=2) == own(assistant, 24, **DRAW, repetition_penalty=2.0).text
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    assert text(temperature=0, **penalties) == own(assistant, 24, temperature=0.0, **penalties).text != greedy
    assert text(ignore_eos=True) == own(assistant, 24, **DRAW, stop_ids=frozenset()).text


def test_no_number_is_beyond_json(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="tiny", prompt=[5, 6], echo=True, logprobs=20, max_tokens=1)
    assert json.loads(raw.text, parse_constant=pytest.fail)


def test_json_in_slices_is_json_at_once() -> None:
    tokens = [{"token": f"ü{i}\u2028", "logprob": -i / 7, "top_logprobs": [{"bytes": [i]}] * 20} for i in range(100)]
    value = {"a": {}, "b": [], "c": None, "choices": [{"logprobs": {"content": tokens, "refusal": None}, "x": '"'}]}
    for encoder in (PLAIN, EVENT):
        pieces = list(slices(value, encoder))
        assert "".join(pieces) == encoder.encode(value)
        choice = list(slices(value["choices"][0], encoder))  # type: ignore[index]
        assert "".join(choice) == encoder.encode(value["choices"][0])  # type: ignore[index]
        assert max(map(len, choice)) < sum(map(len, choice)) / 3


@pytest.mark.parametrize("stream", [True, False])
def test_an_echo_with_log_probabilities_is_shaped_beside_the_event_loop(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """And a stream brings the same as a plain answer."""
    shape, where = TextLogprobs.shape, []

    def watched(*args: Any, **more: Any) -> dict[str, Any]:
        where.append(threading.current_thread())
        return shape(*args, **more)

    monkeypatch.setattr(TextLogprobs, "shape", watched)
    served = api.make_app({"tiny": assistant})
    loops: list[threading.Thread] = []

    @served.get("/loop")
    async def loop() -> None:
        loops.append(threading.current_thread())

    body = {"model": "tiny", "prompt": PROMPT, "echo": True, "logprobs": 3, "max_tokens": 3, **DRAW}
    with TestClient(served, base_url="http://127.0.0.1") as http:
        http.get("/loop")
        plain = http.post("/v1/completions", json=body).json()["choices"][0]
        where.clear()
        text = http.post("/v1/completions", json={**body, "stream": stream}).text
    assert where and loops[0] not in where
    if stream:
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: {")]
        told = [json.loads(line)["choices"][0] for line in lines]
        assert "".join(c["text"] for c in told) == plain["text"]
        for key, values in plain["logprobs"].items():
            assert [v for c in told for v in (c["logprobs"] or {key: []})[key]] == values


def test_the_log_probabilities_of_prompts_are_bounded(endless: Assistant) -> None:
    body = {"model": "tiny", "prompt": [[5] * 2_000] * 16, "echo": True, "logprobs": 20, "max_tokens": 0}
    answer = local(endless).post("/v1/completions", json=body)
    assert "500000" in refusal(answer, 400, "prompt")["message"]
