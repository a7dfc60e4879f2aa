"""Bad requests to a real `sftflow serve` process: the right status, a small error in the one shape, and it lives on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.serving import ASK, local, refusal, running, tiny
from sftflow.chat.encode import Encoder
from sftflow.chat.render import Renderer
from sftflow.checkpoint import Assistant
from sftflow.serving import api, request_body
from sftflow.serving import uvicorn_limits as listen
from sftflow.serving.errors import ApiError
from sftflow.serving.prompt import read_messages
from sftflow.serving.request_body import Pace, ReaderPool

CHAT, TEXT, RENDER = "/v1/chat/completions", "/v1/completions", "/v1/render"
KEY = {"Authorization": "Bearer k", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Bad:
    """One bad request. body: bytes as they are, else JSON."""

    status: int
    body: Any = b""
    path: str = CHAT
    method: str = "POST"
    headers: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    code: str | None = None


def chat(status: int, *, param: str | None = None, code: str | None = None, **fields: Any) -> Bad:
    return Bad(status, {"model": "tiny", "messages": ASK, "max_tokens": 2, **fields}, param=param, code=code)


def text(status: int, *, param: str | None = None, code: str | None = None, **fields: Any) -> Bad:
    return Bad(status, {"model": "tiny", "prompt": "a", "max_tokens": 2, **fields}, TEXT, param=param, code=code)


def said(*messages: Any, param: str | None = None) -> Bad:
    return chat(400, messages=list(messages), param=param)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


USER = {"role": "user", "content": "a"}
TOO_LONG = "context_length_exceeded"
BAD = [
    # bodies
    Bad(400, b"", code="invalid_json"),
    Bad(400, b"{", code="invalid_json"),
    Bad(400, b"hello", code="invalid_json"),
    Bad(400, b"[]", code="invalid_json"),
    Bad(400, b'"a"', code="invalid_json"),
    Bad(400, b"\xff\xfe{}", code="invalid_json"),
    Bad(400, b'{"model": "\\udc00"}', code="invalid_json"),
    Bad(400, b'{"model": "tiny", "messages": [], "messages": []}', code="invalid_json"),
    Bad(400, b'{"n": 1' + b"0" * 10_000 + b"}", code="invalid_json"),
    Bad(400, b"[" * 1_000_000, code="invalid_json"),
    Bad(400, b'{"a":' * 300_000, code="invalid_json"),
    Bad(400, b'{"model": "tiny", "temperature": NaN}', code="invalid_json"),
    Bad(400, b'{"model": "tiny", "temperature": Infinity}', code="invalid_json"),
    Bad(400, b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        param="temperature"),
    Bad(400, b'{"model": "tiny"}', param="messages"),
    Bad(400, {"messages": ASK}, param="model"),
    Bad(413, b"x" * (2 * 1024 * 1024 + 1), code="body_too_large"),
    Bad(413, b"x" * 20_000_000, code="body_too_large"),
    Bad(413, b"", headers={"Content-Length": "99999999999999999999"}, code="body_too_large"),
    # types and values
    chat(400, temperature="1", param="temperature"),
    chat(400, temperature=-1, param="temperature"),
    chat(400, temperature=[], param="temperature"),
    chat(400, top_p=2, param="top_p"),
    chat(400, top_k=1.5, param="top_k"),
    chat(400, n=10**6, param="n"),
    chat(400, n=-1, param="n"),
    chat(400, n="2", param="n"),
    chat(400, seed=10**30, param="seed"),
    chat(400, seed="a", param="seed"),
    chat(400, max_tokens=-5, param="max_tokens"),
    chat(400, max_completion_tokens=0, param="max_completion_tokens"),
    chat(400, stop=[[]], param="stop"),
    chat(400, stop="x" * 1000, param="stop"),
    chat(400, stream=1, param="stream"),
    chat(400, stream_options="usage", param="stream_options"),
    chat(400, logprobs="yes", param="logprobs"),
    chat(400, logprobs=True, top_logprobs=100, param="top_logprobs"),
    chat(400, frequency_penalty=99, param="frequency_penalty"),
    chat(400, response_format={"type": "json_schema"}, param="response_format"),
    chat(400, logit_bias={"1": 100}, param="logit_bias", code="unsupported_parameter"),
    chat(400, tools=[{"type": "function", "function": {"name": "f"}}], param="tools", code="unsupported_parameter"),
    chat(400, tools=[{"type": "web_search"}], param="tools[0]"),
    chat(400, tools=[{"type": "function", "function": {"name": "a b"}}], param="tools[0].function.name"),
    chat(400, tools="all", param="tools"),
    chat(400, tool_choice="required", param="tool_choice"),
    chat(400, model=5, param="model"),
    chat(404, model="nobody", param="model", code="model_not_found"),
    chat(404, model="../../etc/passwd", param="model", code="model_not_found"),
    chat(404, model="x" * 100_000, param="model", code="model_not_found"),
    # messages
    said(param="messages"),
    said("hi"),
    said(nested(500)),
    said({"role": "robot", "content": "a"}),
    said({"role": ["user"], "content": "a"}),
    said({"role": "user"}),
    said({"role": "user", "content": 1}),
    said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}),
    said({"role": "user", "content": [{"type": "input_audio"}]}),
    said({"role": "tool", "content": "a"}),
    said({"role": "assistant", "content": "a"}),
    said(*[USER] * 10_000, param="messages"),
    said(*[USER, {"role": "assistant", "content": "b"}] * 900, USER, param="messages"),
    chat(400, messages={"role": "user"}, param="messages"),
    chat(400, messages=[{"role": "user", "content": "zq" * 900_000}], param="messages", code=TOO_LONG),
    # plain completions
    text(400, prompt=None, param="prompt"),
    text(400, prompt=[-1], param="prompt"),
    text(400, prompt=[2**31], param="prompt"),
    text(400, prompt=[[1], "a"], param="prompt"),
    text(400, prompt=nested(900), param="prompt"),
    text(400, prompt=["a"] * 1000, param="prompt"),
    text(400, prompt="zq" * 900_000, param="prompt", code=TOO_LONG),
    text(400, prompt=[5] * 300, param="prompt", code=TOO_LONG),
    text(400, logprobs=-1, param="logprobs"),
    text(400, suffix="b", param="suffix"),
    # who and where
    Bad(401, chat(0).body, headers={"Authorization": ""}, code="invalid_api_key"),
    Bad(401, chat(0).body, headers={"Authorization": "Bearer wrong"}, code="invalid_api_key"),
    Bad(401, path=RENDER, headers={"Authorization": "Basic azpr"}, code="invalid_api_key"),
    Bad(401, path="/metrics", method="GET", headers={"Authorization": ""}, code="invalid_api_key"),
    Bad(403, chat(0).body, headers={"Origin": "https://evil.example"}, code="origin_not_allowed"),
    Bad(403, chat(0).body, headers={"Origin": "null"}, code="origin_not_allowed"),
    Bad(403, chat(0).body, headers={"Origin": "http://["}, code="origin_not_allowed"),
    Bad(403, chat(0).body, headers={"Host": "evil.example"}, code="host_not_allowed"),
    Bad(403, chat(0).body, headers={"Host": "127.0.0.1.evil.example"}, code="host_not_allowed"),
    Bad(415, chat(0).body, headers={"Content-Type": "text/plain"}, code="unsupported_media_type"),
    Bad(415, b"model=tiny", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    Bad(415, chat(0).body, headers={"Content-Encoding": "gzip"}),
    Bad(404, path="/v1/nothing", method="GET"),
    Bad(404, path="/v1/models/nobody", method="GET", code="model_not_found"),
    Bad(404, path="/..%2f..%2fetc/passwd", method="GET"),
    Bad(404, path="/page.js/../../pyproject.toml", method="GET"),
    Bad(405, method="GET"),
    Bad(405, method="DELETE"),
    Bad(405, path="/health", method="POST"),
    Bad(405, method="BREW"),
    Bad(431, method="GET", path="/health", headers={f"x-{i}": "y" * 1000 for i in range(40)}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a `sftflow serve` process with a key."""
    directory = tmp_path_factory.mktemp("bad") / "tiny"
    tiny(directory, 256)
    command = [sys.executable, "-m", "sftflow", "serve", str(directory), "--port", "0", "--api-key", "k"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(x for x in process.stderr if x.startswith("serving "))
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield int(line.split(":")[2].split()[0])
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)
        reader.join(5)
    assert not [x for x in log if "Traceback" in x or "Exception" in x], log[-30:]


def send(port: int, bad: Bad) -> httpx.Response:
    body = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {**KEY, **bad.headers}
    try:
        connection.putrequest(bad.method, bad.path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if bad.method != "GET" and "Content-Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body if bad.method != "GET" else None)
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
    finally:
        connection.close()


def test_bad_requests(server: int) -> None:
    assert len(BAD) >= 60
    for number, bad in enumerate(BAD):
        answer = send(server, bad)
        label = f"{number}: {bad.method} {bad.path} {str(bad.body)[:80]} {str(bad.headers)[:80]}"
        assert answer.status_code == bad.status, (label, answer.text)
        error = refusal(answer, bad.status)
        assert bad.param in (None, error["param"]), (label, error)
        assert bad.code in (None, error["code"]), (label, error)
        known = ("application/json", CHAT)
        assert "/" not in functools.reduce(lambda m, k: m.replace(k, ""), known, error["message"]), (
            label,
            error,
        )  # no paths
    good = chat(0).body
    answer = httpx.post(f"http://127.0.0.1:{server}{CHAT}", json=good, headers=KEY, timeout=20)
    assert answer.status_code == 200, answer.text


RAW = {
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,  # TLS
    b"GARBAGE\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\n\r\n": 400,  # no Host
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n": 400,
    b"GET / HTTP/1.0\r\n\r\n": 403,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n": 400,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n": 400,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
    b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n": 431,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000: 431,
}


def answer_to(port: int, sent: bytes) -> tuple[int, dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        raw.sendall(sent)
        data = b""
        while piece := raw.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_what_is_not_http(server: int) -> None:
    for sent, status in RAW.items():
        got, body = answer_to(server, sent)
        assert got == status, (sent[:60], got, body)
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"http://127.0.0.1:{server}/health").status_code == 200


class Quick(listen.Connection):
    header_seconds = 0.6
    body_seconds = 0.6
    idle_seconds = 0.6
    write_seconds = 0.6
    most = 4


HEAD = b"POST /v1/render HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),  # a connection that says nothing
        (b"G", b"E"),
        (HEAD, b"X: y\r\n"),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal", b"t"),  # the second on one connection
    ],
)
def test_what_drips_is_cut_off(assistant: Assistant, first: bytes, drip: bytes) -> None:
    with running(api.make_app({"tiny": assistant}), Quick) as url:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as raw:
            raw.sendall(first)
            data = b""
            raw.settimeout(0.1)
            while time.monotonic() - began < 30:
                try:
                    piece = raw.recv(65536)
                    data += piece
                    if not piece:
                        break
                except TimeoutError:
                    raw.sendall(drip)
                except OSError:
                    break
        assert 0.5 < time.monotonic() - began < 25
        assert b" 408 " in data and b"request_timeout" in data
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_slow_client_that_is_within_the_limits_is_served(assistant: Assistant) -> None:
    body = json.dumps({"model": "tiny", "messages": ASK}).encode()
    sent = HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    with (
        running(api.make_app({"tiny": assistant}), Quick) as url,
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as raw,
    ):
        for left in range(0, len(sent), 40):
            raw.sendall(sent[left : left + 40])
            time.sleep(0.05)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON, SIZE, KEYED = b"Content-Type: application/json\r\n", b"Content-Length: 2\r\n", b"Authorization: Bearer k\r\n"
EARLY = [
    # what is sent at first, the beginning of its answer, what follows
    (POST + JSON + SIZE + b"\r\n", b"401", b"{}"),
    (POST + JSON + SIZE + b"\r\n", b"401", b"{"),
    (POST + JSON + SIZE + b"\r\n", b"401", b"{}GET /health"),
    (POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"401", b"1\r\n{\r\n"),
    (POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"401", b"2\r\n{}\r\n0\r\n\r\n"),
    (POST + JSON + SIZE + b"Expect: 100-continue\r\n\r\n", b"401", b""),
    (POST + JSON + SIZE + KEYED + b"Expect: 100-continue\r\n\r\n", b"100", b"{"),
    (POST + JSON + SIZE + KEYED + b"Origin: http://a\r\n\r\n", b"403", b"{}"),
    (POST + JSON + SIZE + KEYED + b"X: " + b"y" * 33_000 + b"\r\n\r\n", b"431", b"{}"),
    (POST + b"Content-Type: text/plain\r\n" + SIZE + KEYED + b"\r\n", b"415", b"{}"),
    (POST + JSON + b"Content-Length: 9999999\r\n" + KEYED + b"\r\n", b"413", b"{}"),
    (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + SIZE + KEYED + b"\r\n", b"404", b"{}"),
    (b"POST /boom HTTP/1.1\r\nHost: localhost\r\n" + SIZE + KEYED + b"\r\n", b"500", b"{}"),
    (b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n" + SIZE + b"\r\n", b"405", b"{}"),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + SIZE + b"\r\n", b"200", b"{}"),
    (b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n" + SIZE + b"\r\n", b"200", b"{}"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"200", b"2\r\n{}\r\n"),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2, b"200", b"GET /health HTTP/1.1\r\nHost: lo"),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", b"200", b""),
    (b"CONNECT / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405", b"{}"),
]  # fmt: skip


def test_head_and_body_of_an_answer_come_together(assistant: Assistant) -> None:
    """A client that reads once has both; else what it has not read looks like a connection that is still in use."""
    with running(api.make_app({"tiny": assistant}, api_key="k")) as url:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as raw:
                raw.sendall(POST + JSON + SIZE + b"\r\n")
                assert raw.recv(4096).endswith(b"}}")


def test_who_was_answered_early_and_then_is_silent_is_hung_up_on(assistant: Assistant) -> None:
    """In whatever state the request was, however much of its body came."""
    app = api.make_app({"tiny": assistant}, api_key="k")

    @app.post("/boom")
    async def boom() -> None:
        raise LookupError("inside")

    class Many(Quick):
        most = 100

    with running(app, Many) as url, contextlib.ExitStack() as stack:
        held = []
        for first, status, _ in EARLY:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5))
            raw.sendall(first)
            assert raw.recv(65536).startswith(b"HTTP/1.1 " + status), first
            held.append(raw)
        for raw, (_, _, rest) in zip(held, EARLY, strict=True):
            with contextlib.suppress(BrokenPipeError):
                raw.sendall(rest)
        until = time.monotonic() + 4
        for raw, about in zip(held, EARLY, strict=True):
            raw.settimeout(max(0.1, until - time.monotonic()))
            with contextlib.suppress(ConnectionError):
                while True:
                    try:
                        if not raw.recv(65536):
                            break
                    except TimeoutError:
                        pytest.fail(f"still open: {about}")


def test_who_does_not_read_is_hung_up_on(assistant: Assistant) -> None:
    """Whether so much waits that the writing stands still, or so little that it was thought to be sent."""
    lost: list[Quick] = []

    class Watched(Quick):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.append(self)

    with running(api.make_app({"tiny": assistant}), Watched) as url, contextlib.ExitStack() as stack:
        for n in (3, 40):
            raw = stack.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            raw.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                raw.sendall(b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * n)
        until = time.monotonic() + 8
        while len(lost) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(lost) == 2


def test_strangers_who_fill_all_places_do_not_keep_others_out(endless: Assistant) -> None:
    """All places are held by connections without the key, in every state; a newcomer takes that of the longest waited
    for. A running reply and a body under its key keep theirs."""

    class Patient(listen.Connection):
        most = 8

    app = api.make_app({"tiny": endless}, api_key="k")
    body = json.dumps({"model": "tiny", "messages": ASK, "max_tokens": 3, "seed": 1}).encode()
    streamed = json.dumps({"model": "tiny", "messages": ASK, "stream": True}).encode()
    keyed = HEAD.replace(b"/v1/render", b"/v1/chat/completions") + KEYED
    with running(app, Patient) as url, contextlib.ExitStack() as stack:
        port = int(url.rsplit(":", 1)[1])

        def connected(sent: bytes) -> socket.socket:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            raw.sendall(sent)
            return raw

        running_reply = connected(keyed + b"Content-Length: %d\r\n\r\n" % len(streamed) + streamed)
        assert b"text/event-stream" in running_reply.recv(65536)
        slow = connected(keyed + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1])
        assert running_reply.recv(65536)  # the server has gone on: it has seen that key
        time.sleep(0.1)
        states = (
            b"",
            b"GET /hea",
            EARLY[0][0],
            EARLY[0][0] + b"{}",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        )
        strangers = [connected(states[i % len(states)]) for i in range(20)]
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        answer = httpx.post(f"{url}{CHAT}", content=body, headers=KEY, timeout=20)
        assert answer.status_code == 200, answer.text
        slow.sendall(body[-1:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert running_reply.recv(65536)
        assert len(strangers) == 20


def test_who_is_answered_keeps_its_place(endless: Assistant) -> None:
    """Where every place is that of a running reply, the newcomer is asked to come again."""
    streamed = json.dumps({"model": "tiny", "messages": ASK, "stream": True}).encode()
    with running(api.make_app({"tiny": endless}), Quick) as url, contextlib.ExitStack() as stack:
        port = int(url.rsplit(":", 1)[1])
        for _ in range(4):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            raw.sendall(
                HEAD.replace(b"render", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(streamed) + streamed
            )
            assert b"text/event-stream" in raw.recv(65536)
        status, body = answer_to(port, b"")
        assert status == 503 and body["error"]["code"] == "too_many_connections"
    with running(api.make_app({"tiny": endless}), Quick) as url:
        assert httpx.get(f"{url}/health").status_code == 200


def test_large_bodies_do_not_hold_up_the_others(endless: Assistant) -> None:
    """2 MB of prompt are parsed, rendered and encoded while /health is asked again and again."""
    words = " ".join(f"word{i}" for i in range(200_000))[:1_900_000]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": words}]})
    waited: list[float] = []
    answers: list[httpx.Response] = []
    with running(api.make_app({"tiny": endless})) as url:

        def large() -> None:
            json_type = {"Content-Type": "application/json"}
            answers.append(httpx.post(f"{url}{CHAT}", content=body, headers=json_type, timeout=60))

        thread = threading.Thread(target=large)
        with httpx.Client() as client:
            thread.start()
            while thread.is_alive():
                began = time.monotonic()
                assert client.get(f"{url}/health", timeout=20).status_code == 200
                waited.append(time.monotonic() - began)
        thread.join()
    refusal(answers[0], 400, "messages", TOO_LONG)
    assert max(waited) < 3  # reading it in the event loop would hold it up for longer


def test_ten_thousand_short_messages_in_a_large_context_answer_in_bounded_time(endless: Assistant) -> None:
    http_client = local(endless)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    began = time.monotonic()
    refusal(http_client.post(RENDER, json={"model": "tiny", "messages": turn * 5_000}), 400, "messages")
    assert time.monotonic() - began < 30  # rendering them would take minutes


def test_what_cannot_fit_is_not_encoded(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that a context cannot hold are refused by their length, wherever the text stands, in words and with a code
    that clients know."""
    encoded: list[int] = []
    plain = Encoder.plain

    def watched(self: Encoder, text: str) -> list[int]:
        encoded.append(len(text))
        return plain(self, text)

    monkeypatch.setattr(Encoder, "plain", watched)
    client, n = local(assistant), 100_000
    tool = {"type": "function", "function": {"name": "f", "description": "w" * n}}
    for content in ("w" * n, "two words " * n, " " * n, "日本" * n, "🙂" * n, "<|bos|>" * n):
        for path in (CHAT, RENDER):
            answer = client.post(path, json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
            error = refusal(answer, 400, "messages", TOO_LONG)
            n_tokens = int(error["message"].split(" resulted in at least ")[1].split()[0])
            assert error["message"] == (
                f"This model's maximum context length is 256 tokens. However, your messages resulted in at least "
                f"{n_tokens} tokens. Please reduce the length of the messages. (context_length_exceeded)"
            )
            assert error["type"] == "invalid_request_error" and 256 <= n_tokens <= len(content.encode())
        refusal(client.post(TEXT, json={"model": "tiny", "prompt": ["a", content]}), 400, "prompt", TOO_LONG)
        said = [*ASK, {"role": "assistant", "content": content + "x"}]
        more = {"add_generation_prompt": False, "continue_final_message": True}
        refusal(client.post(CHAT, json={"model": "tiny", "messages": said, **more}), 400, "messages", TOO_LONG)
    refusal(client.post(TEXT, json={"model": "tiny", "prompt": [10**9] * n}), 400, "prompt", TOO_LONG)
    refusal(client.post(CHAT, json={"model": "tiny", "messages": ASK, "tools": [tool]}), 400)
    assert max(encoded) < 1000


def test_large_bodies_are_paced_and_small_ones_are_not(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are read or thrown away: so many bytes a second, of all together."""

    class Paced(Quick):
        body_seconds = 30.0
        most = 100
        thrown_away = Pace(per_second=2_000_000, burst=100_000)

    monkeypatch.setattr(request_body, "BODIES", Pace(per_second=2_000_000, burst=100_000))
    large = json.dumps({"model": "tiny", "messages": ASK, "metadata": "x" * 1_500_000}).encode()
    small = json.dumps({"model": "tiny", "messages": ASK}).encode()
    with running(api.make_app({"tiny": assistant}, api_key="k"), Paced) as url:
        for headers, body, status, paced in ((KEY, large, 200, True), ({}, large, 401, True), (KEY, small, 200, False)):
            began = time.monotonic()
            sent = HEAD + b"".join(f"{k}: {v}\r\n".encode() for k, v in headers.items() if k != "Content-Type")
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as raw:
                raw.sendall(sent + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                data = b""
                while piece := raw.recv(65536):
                    data += piece
            assert data.startswith(b"HTTP/1.1 %d" % status) and data.endswith(b'{"status":"ok"}')
            assert (time.monotonic() - began > 0.4) == paced


def empty(n: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": ""} for i in range(n)]


def test_many_empty_messages_are_refused_before_they_are_rendered(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Any] = []
    monkeypatch.setattr(Renderer, "render", lambda *args, **more: rendered.append(args))
    client = local(assistant)
    for path in (CHAT, RENDER):
        answer = client.post(path, json={"model": "tiny", "messages": empty(1999)})
        refusal(answer, 400, "messages", TOO_LONG)
    assert not rendered


@pytest.mark.parametrize("content", ["", "a", "<|user_end|>", " <|bos|><|bos|>\n", "é🙂 1\n\n"])
@pytest.mark.parametrize("n", [1, 7, 31])
def test_what_fits_is_never_refused_early(assistant: Assistant, content: str, n: int) -> None:
    conversation = read_messages([{**m, "content": content} for m in empty(n)])
    about, least = assistant.renderer.rough_length(conversation)
    assert least <= len(assistant.renderer.render(conversation, add_generation_prompt=True).ids)
    assert least <= about and (content or least > 2 * n)


def test_few_requests_are_read_at_once_and_small_ones_do_not_wait_for_large_ones() -> None:
    free, at_once, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def work() -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        free.wait(10)
        with lock:
            at_once -= 1
        return 1

    async def scenario() -> None:
        reading = ReaderPool(small=1, large=2, seconds=0.2)
        large = [asyncio.create_task(reading.run(work, 100_000)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await reading.run(lambda: 2, 100) == 2
        with pytest.raises(ApiError) as caught:
            await reading.run(work, 100_000)
        assert caught.value.status == 503 and caught.value.headers["Retry-After"]
        large[0].cancel()  # its thread goes on, and so its place is taken
        with pytest.raises(ApiError):
            await reading.run(work, 100_000)
        free.set()
        assert await large[1] == 1
        assert await reading.run(work, 100_000) == 1

    asyncio.run(scenario())
    assert most == 2


def test_no_file_of_the_package_is_reachable_but_the_page(assistant: Assistant) -> None:
    client = local(assistant)
    for name in ("../api.py", "..%2fapi.py", "page/index.html", "page/../api.py", ".git/config"):
        assert client.get(f"/{name}").status_code == 404
    assert {f for f, _ in api.PAGE.values()} <= {p.name for p in (Path(api.__file__).parent / "page").iterdir()}
