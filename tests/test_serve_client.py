"""The server as clients meet it: a real tiny model, a real uvicorn, the real `openai` client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from helpers.serving import ASK, DRAW, ask, own, request, running, twin
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.serving import api


@pytest.fixture(scope="session")
def address(assistant: Assistant) -> Iterator[str]:
    with running(api.make_app({"tiny": assistant, "runs/other": load_assistant(assistant.name)})) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=20)


def test_plain_reply_is_the_engines_own(client: openai.OpenAI, assistant: Assistant) -> None:
    expected = own(assistant, 24)
    got = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=24, **DRAW)
    assert got.object == "chat.completion" and got.model == "tiny" and got.id.startswith("chatcmpl-")
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == expected.text
    assert got.choices[0].finish_reason == expected.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.n_prompt
    assert got.usage.completion_tokens == len(expected.ids)
    assert got.usage.total_tokens == expected.n_prompt + len(expected.ids)


def test_streamed_reply_has_the_openai_shape_and_the_same_text(address: str, assistant: Assistant) -> None:
    expected = own(assistant, 24)
    body = ask(stream=True, max_tokens=24, stream_options={"include_usage": True})
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = response.read().decode("ascii")
    blocks = raw.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    first, *middle, final, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(
        list(c["choices"][0]["delta"]) == ["content"] and c["choices"][0]["finish_reason"] is None for c in middle
    )
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == expected.text
    assert final["choices"][0]["delta"] == {} and final["choices"][0]["finish_reason"] == expected.finish_reason
    assert all(c["usage"] is None for c in chunks[:-1])
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(expected.ids)


def test_openai_client_streams(client: openai.OpenAI, assistant: Assistant) -> None:
    stream = client.chat.completions.create(
        model="runs/other", messages=ASK, max_completion_tokens=9, max_tokens=2, stream=True, **DRAW
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == own(assistant, 9).text
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert all(c.usage is None for c in chunks)


def test_omitted_max_tokens_is_what_fits(client: openai.OpenAI, assistant: Assistant) -> None:
    got = client.chat.completions.create(model="tiny", messages=ASK)
    assert got.usage is not None
    if got.choices[0].finish_reason == "length":
        assert got.usage.total_tokens == assistant.engine.context
    asked_for_more = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=100_000)
    assert asked_for_more.choices[0].message.content == got.choices[0].message.content


def test_seed_repeats_and_temperature_varies(client: openai.OpenAI) -> None:
    def reply(**options: Any) -> str | None:
        got = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=16, temperature=1.5, extra_body={"top_k": 200}, **options
        )
        return got.choices[0].message.content

    assert reply(seed=7) == reply(seed=7)
    assert len({reply(seed=s) for s in range(4)} | {reply()}) > 1


def test_stop_text_is_cut_plain_and_streamed(client: openai.OpenAI, assistant: Assistant) -> None:
    """The stop text crosses the border of two deltas, and nothing of it is ever shown."""
    full = own(assistant, 40)
    deltas = [d.text for d in twin(assistant.name).engine.stream(request(assistant, 40)) if d.text]
    ends = [sum(map(len, deltas[: i + 1])) for i in range(1, len(deltas) - 1)]
    at = next(end for end in ends if full.text.find(full.text[end - 1 : end + 1]) == end - 1)
    stop = full.text[at - 1 : at + 1]
    plain = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=40, **DRAW, stop=stop)
    assert plain.choices[0].message.content == full.text[: at - 1]
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage is not None and plain.usage.completion_tokens < len(full.ids)
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=40, **DRAW, stop=["\0never", stop], stream=True
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == full.text[: at - 1]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "runs/other"]
    assert client.models.retrieve("tiny").owned_by == "sftflow"
    assert httpx.get(f"{client.base_url}models/runs/other").json()["id"] == "runs/other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_openai_client_sees_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=ASK)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "zq" * 500}])
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"


def test_a_message_as_the_client_got_it_can_be_sent_back(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3).choices[0].message
    echoed: Any = [*ASK, got.model_dump(), {"role": "user", "content": [{"type": "text", "text": "and then?"}]}]
    assert client.chat.completions.create(model="tiny", messages=echoed, max_tokens=3).choices


def test_many_at_once_answer_the_same_and_health_stays_quick(address: str, assistant: Assistant) -> None:
    expected = own(assistant, 40).text

    async def all_of_them() -> tuple[list[str], float]:
        async with httpx.AsyncClient(base_url=address, timeout=30) as http:
            jobs = [asyncio.create_task(http.post("/v1/chat/completions", json=ask(max_tokens=40))) for _ in range(8)]
            await asyncio.sleep(0.05)
            began = time.perf_counter()
            assert (await http.get("/health")).json() == {"status": "ok"}
            waited = time.perf_counter() - began
            return [r.json()["choices"][0]["message"]["content"] for r in await asyncio.gather(*jobs)], waited

    texts, waited = asyncio.run(all_of_them())
    assert texts == [expected] * 8
    assert waited < 1
