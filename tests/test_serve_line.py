"""The line in front of the engine: clients that leave, a line that is full, a server that stops."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest

from helpers.serving import ASK, ask, refusal, running
from sftflow.checkpoint import Assistant
from sftflow.serving import api

ENDLESS = {"model": "tiny", "messages": ASK, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_work(endless: Assistant, stream: bool) -> None:
    with running(api.make_app({"tiny": endless}, max_running=1)) as url:
        raw = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        time.sleep(0.3)
        with pytest.raises(httpx.ReadTimeout):  # its one slot is taken
            httpx.post(f"{url}/v1/chat/completions", json=ask(), timeout=0.3)
        raw.close()
        assert httpx.post(f"{url}/v1/chat/completions", json=ask(), timeout=5).status_code == 200


def test_a_full_line_answers_503_and_leaving_frees_it(endless: Assistant) -> None:
    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            first = [asyncio.create_task(http.post("/v1/chat/completions", json=ENDLESS)) for _ in range(3)]
            await asyncio.sleep(0.5)
            refused = await http.post("/v1/chat/completions", json=ask())
            assert refusal(refused, 503)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            await asyncio.sleep(0.5)
            assert (await http.post("/v1/chat/completions", json=ask())).status_code == 200

    with running(api.make_app({"tiny": endless}, max_running=1, max_waiting=2)) as url:
        asyncio.run(scenario(url))


def test_stopping_the_server_ends_running_replies(endless: Assistant) -> None:
    began = time.monotonic()
    with httpx.Client(timeout=60) as http:
        with running(api.make_app({"tiny": endless})) as url:
            sent = http.build_request("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True})
            answer = http.send(sent, stream=True)
            pieces = answer.iter_text()
            assert '"role": "assistant"' in next(pieces)
        rest = "".join(pieces)
    assert '"code": "stopping"' in rest and "[DONE]" not in rest
    assert time.monotonic() - began < 30  # it would go on for a million tokens
