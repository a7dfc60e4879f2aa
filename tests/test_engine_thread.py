"""One thread keeps the engine running for everyone on the event loop: the same replies, and nobody disturbs another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import starlette.requests
import torch
from fastapi.testclient import TestClient

from helpers.generation import ask, failing
from sftflow.foundation.errors import CheckpointError, RunError, SftflowError
from sftflow.generation.engine import Engine
from sftflow.generation.request import Reply
from sftflow.serving import api
from sftflow.serving import engine_thread as module
from sftflow.serving.engine_thread import EngineThread, Generations
from sftflow.serving.errors import ApiError
from sftflow.serving.service import Service, serve

ENDLESS = 230  # tokens


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    loaded = load_assistant(str(tiny_base))
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return loaded


@asynccontextmanager
async def working(assistant: Any, **more: Any) -> AsyncIterator[EngineThread]:
    thread = EngineThread(assistant, **more)
    try:
        yield thread
    finally:
        thread.close()
        await asyncio.to_thread(thread._thread.join, 10)
        assert not thread._thread.is_alive()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


async def read(one: Generations) -> Reply:
    """The reply, which the deltas must be in pieces."""
    text, tokens, last = "", [], None
    async for index, delta in one.deltas():
        assert index == 0
        text += delta.text
        tokens += delta.tokens
        last = delta
    assert last is not None and last.reply is not None and last.finish_reason == last.reply.finish_reason
    assert text == last.reply.text and tuple(tokens) == last.reply.logprobs
    return last.reply


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await scenario()

    asyncio.run(bounded())


def test_replies_are_the_engines_and_join_those_that_run(assistant: Any) -> None:
    requests = [ask(5 + i % 20, 10 + i, i, temperature=float(i % 2), seed=i, logprobs=i % 3) for i in range(40)]
    wanted = Engine(assistant.model, assistant.renderer, assistant.engine.runtime, max_running=8).generate(requests)

    async def scenario() -> None:
        async with working(assistant, max_running=8) as thread:
            jobs = [thread.submit([r], streamed=i % 4 > 0) for i, r in enumerate(requests[:30])]
            replies = [asyncio.create_task(read(job)) for job in jobs]
            await replies[0]  # the others run
            replies += [asyncio.create_task(read(thread.submit([r]))) for r in requests[30:]]
            for reply, right in zip(await asyncio.gather(*replies), wanted, strict=True):
                assert (reply.ids, reply.text) == (right.ids, right.text) or right.near_ties
            await until(lambda: thread.running == 0)
            assert thread.prompt_tokens == sum(len(r.prompt_ids) for r in requests)
            assert thread.generated_tokens == sum(len(r.ids) for r in wanted)
            assert thread.finished == {"stop": 0, "length": 40, "cancelled": 0, "error": 0} and thread.waiting == 0

    run(scenario)


def test_models_that_cannot_let_others_join_take_turns(assistant: Any) -> None:
    requests = [ask(5 + i, 10, i) for i in range(7)]
    padded = Engine(assistant.model, assistant.renderer, assistant.engine.runtime)
    padded._modes = {True: "padded", False: "padded"}
    wanted = assistant.engine.generate(requests)
    before, assistant.engine = assistant.engine, padded

    async def scenario() -> None:
        async with working(assistant, max_running=3) as thread:
            replies = await asyncio.gather(*(read(thread.submit([r])) for r in requests))
            assert [r.ids for r in replies] == [r.ids for r in wanted]

    try:
        run(scenario)
    finally:
        assistant.engine = before


def test_a_full_line_refuses_and_leaving_makes_room(assistant: Any) -> None:
    async def scenario() -> None:
        async with working(assistant, max_running=2, max_waiting=3) as thread:
            jobs = [thread.submit([ask(5, ENDLESS, i)]) for i in range(5)]
            with pytest.raises(module.ApiError) as refused:
                thread.submit([ask(5, 5)])
            assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) > 0
            await until(lambda: thread.running == 2 and thread.waiting == 3)
            for job in jobs[1:]:  # one that runs, three that wait
                job.cancel()
            reply = await read(thread.submit([ask(9, 5)]))
            assert len(reply.ids) == 5
            assert all([d.reply is None async for _, d in jobs[1].deltas()])
            assert thread.finished["cancelled"] == 4
            assert len((await read(jobs[0])).ids) == ENDLESS

    run(scenario)


def test_a_client_that_hangs_up_takes_its_work_with_it(assistant: Any) -> None:
    """At once, and without anybody asking for it again and again."""

    async def scenario() -> None:
        async with working(assistant) as thread:
            gone, asked = asyncio.Event(), 0

            async def receive() -> dict[str, Any]:
                nonlocal asked
                asked += 1
                await gone.wait()
                return {"type": "http.disconnect"}

            request = starlette.requests.Request({"type": "http"}, receive)
            deltas = thread.submit([ask(5, ENDLESS)], client=request).deltas()
            await anext(deltas)
            gone.set()
            rest = [d async for _, d in deltas]
            assert all(d.reply is None for d in rest) and asked == 1
            await until(lambda: thread.finished["cancelled"] == 1 and thread.running == 0)

            early = thread.submit([ask(5, ENDLESS)]).deltas()
            await anext(early)
            await early.aclose()
            await until(lambda: thread.finished["cancelled"] == 2)

    run(scenario)


def test_what_fails_is_told_and_the_worker_goes_on(assistant: Any) -> None:
    context = assistant.engine.context

    async def scenario() -> None:
        async with working(assistant) as thread:
            await until(lambda: thread.ready)
            good = thread.submit([ask(5, 100)])
            with pytest.raises(Exception, match=f"leave no room for a reply in a context of {context}"):
                await read(thread.submit([ask(context, 5)]))
            assert len((await read(good)).ids) == 100
            with failing(assistant.model, lambda ids: True), pytest.raises(torch.OutOfMemoryError):
                await read(thread.submit([ask(5, 100)]))
            assert len((await read(thread.submit([ask(5, 100)]))).ids) == 100
            assert thread.finished["error"] == 2

    run(scenario)


def test_the_replies_to_one_request_end_together(assistant: Any) -> None:
    """Where one of them fails, and where the client leaves; other requests go on."""

    async def scenario() -> None:
        async with working(assistant, max_running=3) as thread:
            other = thread.submit([ask(5, 100)])
            one = thread.submit([ask(5, ENDLESS), replace(ask(5, 5), prompt_ids=()), ask(7, ENDLESS)])
            with pytest.raises(Exception, match="it has no tokens"):
                async for _ in one.deltas():
                    pass
            await until(lambda: thread.finished["cancelled"] == 2 and thread.finished["error"] == 1)
            left = thread.submit([ask(5, ENDLESS, i) for i in range(3)])  # one of them waits
            deltas = left.deltas()
            await anext(deltas)
            await deltas.aclose()
            await until(lambda: thread.finished["cancelled"] == 5)
            assert len((await read(other)).ids) == 100 and thread.finished["length"] == 1

    run(scenario)


@pytest.fixture
def broken(assistant: Any) -> Iterator[Any]:
    own = assistant.engine
    assistant.engine = Engine(assistant.model, assistant.renderer, own.runtime)

    def nothing(*args: Any, **more: Any) -> Any:
        raise NotImplementedError("no kernel for this")

    assistant.model.forward = nothing
    yield assistant
    del assistant.model.forward
    assistant.engine = own


def test_a_model_that_cannot_compute_says_so_to_everyone(broken: Any) -> None:
    async def scenario() -> None:
        async with working(broken) as thread:
            for _ in range(2):
                with pytest.raises(ApiError) as caught:
                    await read(thread.submit([ask(5, 5)]))
                assert (caught.value.status, caught.value.body["error"]["code"]) == (503, "model_unusable")
            assert not thread.ready and thread.unproven and "cannot compute a sequence" in str(thread.broken)

    run(scenario)


def test_a_server_whose_model_cannot_be_computed_ends_and_says_why(broken: Any) -> None:
    for error in (NotImplementedError("no kernel for this"), ZeroDivisionError("a bug")):
        broken.engine = Engine(broken.model, broken.renderer, broken.engine.runtime)
        said: list[str] = []

        def fail(*args: Any, error: Exception = error, **more: Any) -> Any:
            raise error

        broken.model.forward = fail
        with pytest.raises(SftflowError) as caught:
            serve(lambda: {"tiny": broken}, port=0, say=said.append)
        known = isinstance(error, NotImplementedError)
        assert type(caught.value) is (CheckpointError if known else RunError)
        assert caught.value.exit_code == (2 if known else 3)
        assert str(error) in str(caught.value) and "\n" not in str(caught.value)
        broken.engine = Engine(broken.model, broken.renderer, broken.engine.runtime)
        with pytest.raises(type(caught.value)) as beside:
            Service(lambda: {"tiny": broken}, port=0).start()
        assert str(beside.value) == str(caught.value)


def test_a_broken_model_is_not_being_prepared(broken: Any) -> None:
    with TestClient(api.make_app({"tiny": broken}), base_url="http://127.0.0.1") as http:
        for _ in range(100):
            answer = http.get("/ready")
            if answer.json()["error"]["code"] != "not_ready":
                break
            time.sleep(0.05)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        for told in (answer, http.post("/v1/chat/completions", json=body)):
            assert (told.status_code, told.json()["error"]["code"]) == (503, "model_unusable")
        assert http.get("/health").status_code == 200


def test_closing_ends_every_reply(assistant: Any) -> None:
    async def scenario() -> None:
        async with working(assistant, max_running=2) as thread:
            jobs = [thread.submit([ask(5, ENDLESS, i)]) for i in range(4)]
            await until(lambda: thread.running == 2)
            thread.close()
            for job in jobs:
                with pytest.raises(module.ApiError) as stopped:
                    await read(job)
                assert stopped.value.body["error"]["code"] == "stopping"
            with pytest.raises(module.ApiError):
                thread.check_room()

    run(scenario)


def test_the_event_loop_stays_free(assistant: Any) -> None:
    """Sixty-four streams at once; a timer on the same loop is hardly ever late."""

    async def scenario() -> None:
        late: list[float] = []

        async def tick() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.01)
                late.append(time.perf_counter() - began - 0.01)

        async with working(assistant, max_running=32) as thread:
            ticking = asyncio.create_task(tick())
            await asyncio.gather(*(read(thread.submit([ask(20, 60, i, temperature=1.0, seed=i)])) for i in range(64)))
            ticking.cancel()
        assert sorted(late)[int(len(late) * 0.9)] < 0.1

    run(scenario)
