"""Who may ask: keys, hosts, origins, listening addresses."""

from __future__ import annotations

import logging
import socket

import pytest

from serving import ask, local, refusal
from sftflow.checkpoint import Assistant
from sftflow.errors import ServeError
from sftflow.serve import api, listen

KEYED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
    ("POST", "/v1/render"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/nothing"),
    ("GET", "/nothing"),
)


def test_every_route_that_infers_or_tells_of_models_asks_for_the_key(assistant: Assistant) -> None:
    http = local(assistant, api_key="sésame")
    for header in ("", "Bearer wrong", "sésame", "Basic sésame", "Bearer ", "Bearer sésam", "Bearer sésame2"):
        for method, path in KEYED:
            answer = http.request(method, path, headers={"Authorization": header.encode()}, json=ask())
            refusal(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "bearer sésame".encode()}
    assert http.get("/v1/models", headers=right).status_code == 200
    assert http.post("/v1/chat/completions", json=ask(), headers=right).status_code == 200
    assert http.get("/metrics", headers=right).status_code == 200
    for free in ("/health", "/ready", *api.PAGE):
        assert http.get(free).status_code == 200


def test_host_is_checked_with_a_key_and_an_origin_too(assistant: Assistant) -> None:
    key = {"Authorization": "Bearer k"}
    for options in ({}, {"api_key": "k", "allow_origin": "https://app.example"}, {"allow_origin": "*"}):
        http = local(assistant, **options)
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8008", "[::1]:8008", "[::1]"):
            assert http.get("/v1/models", headers={"Host": host, **key}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8008", "[::2]", "", "["):
            refusal(http.get("/v1/models", headers={"Host": host, **key}), 403, code="host_not_allowed")
    assert local(assistant, hosts=None).get("/health", headers={"Host": "anything"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "null", "http://[", "http://127.0.0.1:9", "http://127.0.0.1:8008.evil.example", "", "é"],
)
def test_an_evil_origin_is_refused(assistant: Assistant, origin: str) -> None:
    for options in ({}, {"hosts": None}, {"allow_origin": "https://other.example"}):
        http = local(assistant, **options)
        answer = http.post("/v1/chat/completions", json=ask(), headers={"Origin": origin.encode()})
        refusal(answer, 403, code="origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers


def test_no_cors_unless_allowed(assistant: Assistant) -> None:
    there, here = {"Origin": "https://app.example"}, {"Origin": "http://127.0.0.1:8008"}
    closed = local(assistant)
    assert closed.post("/v1/chat/completions", json=ask(), headers=here).status_code == 200
    assert "access-control-allow-origin" not in closed.get("/health", headers=here).headers
    opened = local(assistant, allow_origin="https://app.example", api_key="k")
    preflight = {**there, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert opened.options("/v1/chat/completions", headers=preflight).status_code == 200
    refused = opened.post("/v1/chat/completions", json=ask(), headers=there)
    refusal(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    taken = opened.post("/v1/chat/completions", json=ask(), headers={**there, "Authorization": "Bearer k"})
    assert taken.status_code == 200 and taken.headers["access-control-allow-origin"] == "https://app.example"


def test_a_host_open_to_others_needs_a_key(assistant: Assistant) -> None:
    for host in ("0.0.0.0", "::", ""):
        for key in (None, ""):
            with pytest.raises(ServeError):
                listen.open_socket(host, 0, api_key=key)
    for key in (" k", "k\n", "a\x00b"):
        with pytest.raises(ServeError):
            listen.open_socket("127.0.0.1", 0, api_key=key)
    listen.open_socket("0.0.0.0", 0, api_key="k").close()
    listen.open_socket("0.0.0.0", 0, insecure=True).close()
    listen.open_socket("localhost", 0).close()


def test_a_port_in_use_is_told_before_any_output(assistant: Assistant) -> None:
    said: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError) as caught:
            api.serve({"tiny": assistant}, host="127.0.0.1", port=port, say=said.append)
    assert str(caught.value) == f"127.0.0.1:{port}: the port is in use; choose another with --port"
    assert not said
    with pytest.raises(ServeError):
        listen.open_socket("127.0.0.1", 99_999)
    with pytest.raises(ServeError):
        listen.open_socket("192.0.2.1", 0, insecure=True)


def test_the_access_log_has_no_contents(assistant: Assistant, caplog: pytest.LogCaptureFixture) -> None:
    http = local(assistant)
    secret = [{"role": "user", "content": "my zebra"}]
    with caplog.at_level(logging.INFO, "sftflow.access"):
        http.post("/v1/chat/completions?zebra=1", json=ask(messages=secret), headers={"x-request-id": "one"})
        http.get("/a%0Ab c")
    first, second = [r.getMessage() for r in caplog.records if r.name == "sftflow.access"]
    n = len(http.post("/v1/render", json={"model": "tiny", "messages": secret}).json()["tokens"])
    assert " POST /v1/chat/completions 200 " in first and f" model=tiny prompt={n} generated=" in first
    assert first.endswith(" id=one") and "zebra" not in first
    assert " GET /a\\nb%20c 404 " in second and "\n" not in second
