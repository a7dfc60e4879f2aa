"""The addresses of the server: an OpenAI-compatible API, our own `/v1/render`, health and metrics, and the page.

    client -> RequestLog, Errors, Auth -> route -> ChatAnswer or TextAnswer (a checked body, its prompts)
           -> worker -> Answering

The event loop only waits: bodies are read into prompts in threads, replies are computed in each model's own thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sftflow.errors import RunError, SftflowError
from sftflow.serving.chat import ChatAnswer, ChatBody, RenderBody, render_ids
from sftflow.serving.completions import TextAnswer, TextBody
from sftflow.serving.concurrency import Reading
from sftflow.serving.engine_thread import MAX_WAITING, SLOTS, Worker, unusable
from sftflow.serving.errors import ApiError
from sftflow.serving.host_check import LOOPBACK, check_origin, host_names
from sftflow.serving.json_stream import slices
from sftflow.serving.logprobs import token_texts
from sftflow.serving.metrics import CONTENT_TYPE, Metrics
from sftflow.serving.middleware import Auth, Errors, RequestLog, access
from sftflow.serving.model_entry import Served
from sftflow.serving.responses import Answer, Answering, ClientDisconnected, EventStream
from sftflow.serving.schemas import SamplingBody, parse_json, read_body
from sftflow.serving.uvicorn_limits import Server, config, open_socket

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")} | {
    f"/{script.name}": (script.name, "text/javascript") for script in (Path(__file__).parent / "page").glob("*.js")
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
HEALTH = ("/health", "/ready")


def make_app(
    assistants: Mapping[str, Assistant],
    *,
    api_key: str | None = None,
    allow_origin: str | None = None,
    hosts: Container[str] = LOOPBACK,
    slots: int = SLOTS,
    max_waiting: int = MAX_WAITING,
    reading: Reading | None = None,
) -> FastAPI:
    """The app that serves these models under their names.

    hosts: the Host names it answers to, see `host_names`.   slots: replies of each model that run side by side.
    max_waiting: those that may stand in line besides.   reading: how many bodies are read at once; else as usual.
    """
    models = {name: Served(name, Worker(a, slots=slots, max_waiting=max_waiting)) for name, a in assistants.items()}
    metrics, reading = Metrics(), reading or Reading()
    created = int(time.time())

    def stop_workers() -> None:
        for served in models.values():
            served.worker.close()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        stop_workers()

    app = FastAPI(
        title="sftflow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.stop_workers = stop_workers
    app.state.unproven = lambda: next((s.worker.broken for s in models.values() if s.worker.unproven), None)
    free = frozenset({*HEALTH, *PAGE})
    app.add_middleware(Auth, api_key=api_key, allow_origin=allow_origin, hosts=hosts, free=free)
    app.add_middleware(Errors)
    if allow_origin:  # outside the guard: a preflight has no key, and a refusal must be readable, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[allow_origin],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestLog, metrics=metrics)
    _add_errors(app)

    def find(name: str) -> Served:
        if name not in models:
            fact = f"no such model; served: {', '.join(models)}"
            raise ApiError(404, fact, param="model", code="model_not_found")
        return models[name]

    def card(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": created,
            "owned_by": "sftflow",
            "max_model_len": served.context,
        }

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> dict[str, str]:
        if any(served.worker.broken is not None for served in models.values()):
            raise unusable()
        if not all(served.worker.ready for served in models.values()):
            raise ApiError(503, "the models are being prepared", code="not_ready", Retry_After="2")
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        text = metrics.text({name: served.worker for name, served in models.items()})
        return Response(text, media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(served) for served in models.values()]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        return card(find(model))

    @app.post("/v1/render")
    async def render(request: Request) -> Response:
        data = await read_body(request)

        def tokens() -> bytes:
            body = RenderBody.read(parse_json(data))
            served = find(body.model)
            served.worker.check_room()
            ids = render_ids(served, body.messages, body.tools or [])
            texts = token_texts(served.assistant.tokenizer, ids)
            told = [{"id": i, "text": t, "special": i in served.silent} for i, t in zip(ids, texts, strict=True)]
            return "".join(slices({"tokens": told})).encode()

        return Response(await reading.run(tokens, len(data)), media_type="application/json")

    async def answered(request: Request, read: Callable[[dict[str, Any]], tuple[Answer, SamplingBody]]) -> Response:
        data = await read_body(request)
        answer, body = await reading.run(lambda: read(parse_json(data)), len(data))
        worker, record = answer.served.worker, request.state.record
        record.model, record.n_prompt = answer.served.name, answer.n_prompt
        worker.check_room(len(answer.requests))
        jobs = [worker.submit(asked, streamed=bool(body.stream)) for asked in answer.requests]
        made = Answering(answer, jobs, record, metrics)
        if body.stream:
            return EventStream(made, body.include_usage)
        try:
            return Response(await made.whole(request), media_type="application/json")
        except ClientDisconnected:
            return Response(status_code=499)  # nobody reads this

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        def read(value: dict[str, Any]) -> tuple[Answer, SamplingBody]:
            body = ChatBody.read(value)
            served = find(body.model)
            served.worker.check_room(body.n or 1)  # before the work of rendering
            return ChatAnswer(served, body), body

        return await answered(request, read)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        def read(value: dict[str, Any]) -> tuple[Answer, SamplingBody]:
            body = TextBody.read(value)
            served = find(body.model)
            served.worker.check_room(body.n or 1)
            return TextAnswer(served, body), body

        return await answered(request, read)

    def add_page(address: str, file: str, kind: str) -> None:
        data = (Path(__file__).parent / "page" / file).read_bytes()

        @app.api_route(address, methods=["GET", "HEAD"])
        async def page() -> Response:
            return Response(data, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

    for address, (file, kind) in PAGE.items():
        add_page(address, file, kind)
    return app


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in the same shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {404: "no such address", 405: "this address does not take this method"}.get(error.status_code)
        answer = ApiError(error.status_code, message or str(error.detail)).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)


def serve(
    assistants: Mapping[str, Assistant],
    *,
    host: str = "127.0.0.1",
    port: int = 8008,
    api_key: str | None = None,
    allow_origin: str | None = None,
    insecure: bool = False,
    allow_hosts: Iterable[str] = (),
    say: Callable[[str], None] = print,
    sock: socket.socket | None = None,
) -> None:
    """Serve until Ctrl-C. sock: from `open_socket`, where the caller opened it before loading the models. Raises
    ServeError, and what kept a model from being proven (CheckpointError, else RunError)."""
    check_origin(allow_origin)
    hosts = host_names(host, allow_hosts)
    sock = sock or open_socket(host, port, api_key=api_key, insecure=insecure)
    with sock:
        app = make_app(assistants, api_key=api_key, allow_origin=allow_origin, hosts=hosts)
        _log_access()
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(assistants)} at http://{shown}:{sock.getsockname()[1]} (Ctrl-C stops)")
        with contextlib.suppress(KeyboardInterrupt):
            Server(config(app)).run(sockets=[sock])
        error = app.state.unproven()
        if isinstance(error, SftflowError):
            raise error
        if error is not None:
            said = (str(error).strip().splitlines() or [""])[0]
            raise RunError("serve", f"the model cannot be generated from ({type(error).__name__}: {said})") from error


def _log_access() -> None:
    """One line a request on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
