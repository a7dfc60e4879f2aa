"""Who may ask: keys, hosts, origins, listening addresses."""

from __future__ import annotations

import logging
import socket

import pytest
from fastapi.testclient import TestClient

from helpers.serving import ask, local, refusal
from sftflow.checkpoint import Assistant
from sftflow.cli import app
from sftflow.foundation.errors import ServeError
from sftflow.serving import api
from sftflow.serving import uvicorn_limits as listen
from sftflow.serving.host_check import check_origin, check_origins, check_root_path, host_names
from sftflow.serving.service import serve

KEYED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
    ("POST", "/v1/render"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/nothing"),
    ("GET", "/nothing"),
)


def test_every_route_that_infers_or_tells_of_models_asks_for_the_key(assistant: Assistant) -> None:
    http = local(assistant, api_key="ses@me")
    wrong = ("wrong", "", "ses@m", "ses@me2", "sés@me", "ses@me\xa0", "\x85ses@me")
    for header in ("", "ses@me", "Basic ses@me", *(f"Bearer {key}" for key in wrong)):
        for method, path in KEYED:
            answer = http.request(method, path, headers={"Authorization": header.encode("latin-1")}, json=ask())
            refusal(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "bearer ses@me"}
    assert http.get("/v1/models", headers={"Authorization": "Bearer \t ses@me \t"}).status_code == 200
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


def test_a_rebound_name_is_no_origin_of_ours_on_an_open_host_either(assistant: Assistant) -> None:
    """A page of evil.example whose name was pointed at this machine has that name as Host and as Origin."""
    own = socket.gethostname().lower()
    for host, taken, refused in (
        (
            "0.0.0.0",
            ["10.0.0.7:8008", "[fe80::1]:8008", "localhost", own, f"{own}:8008"],
            ["evil.example", "10.0.0.7.evil"],
        ),
        ("::", ["192.168.0.5", own], ["evil.example"]),
        ("192.168.0.5", ["192.168.0.5:8008", "127.0.0.1"], ["192.168.0.6", "evil.example:8008"]),
        ("Box.lan", ["box.lan", "BOX.LAN:1"], ["evil.example"]),
        ("fe80::1", ["[fe80::1]:8008"], ["[fe80::2]"]),
    ):
        http = local(assistant, hosts=host_names(host))
        for name in (*taken, *refused):
            answer = http.post("/v1/chat/completions", json=ask(), headers={"Host": name, "Origin": f"http://{name}"})
            if name in taken:
                assert answer.status_code == 200, (host, name)
            else:
                refusal(answer, 403, code="host_not_allowed")
    http = local(assistant, hosts=host_names("0.0.0.0", ["LLM.example"]))
    assert http.get("/health", headers={"Host": "llm.example:8008"}).status_code == 200
    with pytest.raises(ServeError):
        host_names("0.0.0.0", ["http://llm.example"])


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "null", "http://[", "http://127.0.0.1:9", "http://127.0.0.1:8008.evil.example", "", "é"],
)
def test_an_evil_origin_is_refused(assistant: Assistant, origin: str) -> None:
    for options in ({}, {"hosts": host_names("0.0.0.0")}, {"allow_origin": "https://other.example"}):
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


def test_several_origins_may_be_allowed(assistant: Assistant) -> None:
    allowed = ["https://app.example", "http://localhost:3000"]
    http = local(assistant, allow_origin=allowed)
    for origin in (*allowed, "https://other.example", "https://app.example.evil"):
        answer = http.post("/v1/chat/completions", json=ask(), headers={"Origin": origin})
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked = http.options("/v1/chat/completions", headers=preflight)
        if origin in allowed:
            assert answer.status_code == asked.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
        else:
            refusal(answer, 403, code="origin_not_allowed")
            assert asked.status_code == 400 and "access-control-allow-origin" not in asked.headers
    assert check_origins([*allowed, allowed[0]]) == tuple(allowed)
    for wrong in (["*", "https://app.example"], ["https://app.example", "localhost"]):
        with pytest.raises(ServeError) as caught:
            check_origins(wrong)
        assert caught.value.place == "--allow-origin"


@pytest.mark.parametrize("kept", [True, False])
def test_below_a_path_whether_the_proxy_takes_it_off_or_not(assistant: Assistant, kept: bool) -> None:
    http = local(assistant, api_key="k", root_path="/a/llm")
    at = "/a/llm" if kept else ""
    assert http.get(f"{at}/health").json() == {"status": "ok"}
    assert http.get(f"{at}/").text == local(assistant).get("/").text
    refusal(http.get(f"{at}/v1/models"), 401)
    key = {"Authorization": "Bearer k"}
    assert http.get(f"{at}/v1/models/tiny", headers=key).json()["id"] == "tiny"
    assert http.post(f"{at}/v1/chat/completions", json=ask(), headers=key).status_code == 200
    for path in ("/a", "/a/llmx/health", "/a/llm/a/llm/health"):
        refusal(http.get(path, headers=key), 404)
    moved = http.get("/a/llm", follow_redirects=False)
    assert moved.status_code == 308 and moved.headers["location"] == "/a/llm/"


def test_a_path_that_no_proxy_could_show_is_refused() -> None:
    for right in ("", "/llm", "/a/b-c.d_e~1"):
        check_root_path(right)
    for wrong in ("llm", "/llm/", "/", "//a", "/a b", "/a/../b", "/a/.", "/a?b", "/é", "http://a/b"):
        with pytest.raises(ServeError) as caught:
            check_root_path(wrong)
        assert caught.value.place == "--root-path"


def test_a_host_open_to_others_needs_a_key(assistant: Assistant) -> None:
    for host in ("0.0.0.0", "::", ""):
        for key in (None, ""):
            with pytest.raises(ServeError):
                listen.open_socket(host, 0, api_key=key)
    for key in (" k", "k\n", "a\x00b", "a b", "sésame", "ключ", "", "k\x85", "k\xa0"):
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
            serve(lambda: {"tiny": assistant}, host="127.0.0.1", port=port, say=said.append)
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


@pytest.mark.parametrize(
    ("origin", "remedy"),
    [
        ("http://localhost:3000/", "write http://localhost:3000"),
        ("localhost:3000", "write http://localhost:3000"),
        ("https://App.example/page", "write https://app.example"),
        ("http://a.example,http://b.example", "or *"),
        ("", "or *"),
        ("https://*.example", "or *"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_at_start(origin: str, remedy: str) -> None:
    with pytest.raises(ServeError) as caught:
        check_origin(origin)
    assert str(caught.value).startswith("--allow-origin: ") and str(caught.value).endswith(remedy)
    for right in ("*", "http://localhost:3000", "https://app.example", "http://[::1]:3000", "tauri://localhost"):
        check_origin(right)


@pytest.mark.parametrize(
    ("options", "variable", "place"),
    [
        (["--api-key", ""], "k", "--api-key"),
        ([], "", "--api-key"),
        (["--api-key", "sésame"], None, "--api-key"),
        ([], "a b", "--api-key"),
        (["--allow-origin", "localhost:3000"], None, "--allow-origin"),
        (["--allow-host", "http://a"], None, "--allow-host"),
        (["--allow-origin", "http://a", "--allow-origin", "*"], None, "--allow-origin"),
        (["--root-path", "llm"], None, "--root-path"),
        (["--name", ""], None, "--name"),
        (["--name", "a\nb"], None, "--name"),
        (["--name", "other/base", "--base", "other/base"], None, "--name"),
    ],
)
def test_what_could_never_work_is_told_before_loading(
    options: list[str], variable: str | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv("SFTFLOW_API_KEY", raising=False)
    else:
        monkeypatch.setenv("SFTFLOW_API_KEY", variable)
    with pytest.raises(ServeError) as caught:
        app(["serve", "no/such/model", "--port", "0", *options], standalone_mode=False)
    assert caught.value.place == place and caught.value.exit_code == 2


def test_an_unforeseen_error_is_answered_and_remembered_as_ours(assistant: Assistant) -> None:
    served = api.make_app({"tiny": assistant}, allow_origin="https://app.example")

    @served.get("/boom")
    async def boom() -> None:
        raise LookupError("inside")

    http = TestClient(served, base_url="http://127.0.0.1:8008")
    answer = http.get("/boom", headers={"Origin": "https://app.example", "x-request-id": "one"})
    assert "inside" not in refusal(answer, 500, code="internal_error")["message"]
    assert answer.headers["x-request-id"] == "one"
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert 'sftflow_requests_total{route="/boom",status="500"} 1' in http.get("/metrics").text


def test_what_clients_write_makes_no_series_of_metrics(assistant: Assistant) -> None:
    served = api.make_app({'a"b\\c\nd': assistant})
    http = TestClient(served, base_url="http://127.0.0.1:8008")
    http.get("/metrics")
    for i in range(50):
        http.get(f"/nothing/{i}")
        http.get(f"/v1/models/{i}")
        http.request(f"BREW{i}", "/health")
        http.get("/health", headers={"Host": f"{i}.example"})
    text = http.get("/metrics").text
    counts = [line for line in text.splitlines() if line.startswith("sftflow_requests_total")]
    assert len(counts) == 5, counts
    assert 'sftflow_replies_running{model="a\\"b\\\\c\\nd"} 0' in text
