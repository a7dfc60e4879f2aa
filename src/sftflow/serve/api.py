"""The OpenAI layer: `/v1/chat/completions` (plain and streamed), `/v1/models`, our own `/v1/render`, and the page.

    client -> _Guard (host, origin, key) -> route -> wire (a checked body, its ids) -> worker (one a model) -> engine

The shapes are in `wire`, the threads in `worker`; here are the addresses, who may ask, and the listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from sftflow.errors import ServeError
from sftflow.serve.wire import (
    ApiError,
    ChatBody,
    RenderBody,
    completion,
    events,
    generation_request,
    internal,
    prompt_ids,
    read_json,
    token_texts,
)
from sftflow.serve.worker import Worker

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
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


class _Guard:
    """Refuses a request before any route sees it: by its Host, its Origin, its key."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, allow_origin: str | None, hosts: frozenset[str] | None
    ) -> None:
        self.app, self.api_key, self.allow_origin, self.hosts = app, api_key, allow_origin, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None:
            # A page elsewhere can point its own name at 127.0.0.1 (DNS rebinding): its name then stands here.
            name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
            if name not in self.hosts:
                raise ApiError(403, "this Host is not served here; use localhost or 127.0.0.1", code="host_not_allowed")
            # And any page can post blindly to 127.0.0.1 without being able to read the answer.
            if origin and urlsplit(origin).netloc.lower() != host and self.allow_origin not in ("*", origin):
                raise ApiError(403, "this Origin is not allowed; see --allow-origin", code="origin_not_allowed")
        if self.api_key and path.startswith("/v1"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1", "replace"), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "a missing or wrong API key; send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")


def make_app(
    assistants: dict[str, Assistant],
    *,
    api_key: str | None = None,
    allow_origin: str | None = None,
    hosts: frozenset[str] | None = LOOPBACK,
) -> FastAPI:
    """The app that serves these models under their names.

    hosts: the Host names it answers to (for a loopback address, where only a rebound DNS name would bring another);
    None answers to all.
    """
    workers = {name: Worker(assistant) for name, assistant in assistants.items()}
    created = int(time.time())

    def stop_workers() -> None:
        for worker in workers.values():
            worker.close()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        stop_workers()

    app = FastAPI(title="sftflow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.stop_workers = stop_workers
    app.add_middleware(_Guard, api_key=api_key, allow_origin=allow_origin, hosts=hosts)
    if allow_origin:  # added last, so outermost: a preflight has no key, and a refusal must be readable, too
        app.add_middleware(
            CORSMiddleware, allow_origins=[allow_origin], allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {404: "no such address", 405: "this address does not take this method"}.get(error.status_code)
        return ApiError(error.status_code, message or str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return ApiError(500, "an internal error; the server's log says more", code="internal_error").response()

    def worker_of(model: str) -> Worker:
        if model not in workers:
            served = ", ".join(workers)
            raise ApiError(404, f"no such model; served: {served}", param="model", code="model_not_found")
        return workers[model]

    def card(name: str) -> dict[str, Any]:
        context = assistants[name].engine.context
        return {"id": name, "object": "model", "created": created, "owned_by": "sftflow", "max_model_len": context}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in assistants]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        worker_of(model)
        return card(model)

    @app.post("/v1/render")
    async def render(request: Request) -> dict[str, Any]:
        body = RenderBody.read(await read_json(request))
        assistant = worker_of(body.model).assistant
        special = set(assistant.renderer.special.values())

        def tokens() -> list[dict[str, Any]]:
            ids = prompt_ids(assistant, body.messages)
            texts = token_texts(assistant.tokenizer, ids)
            return [{"id": i, "text": t, "special": i in special} for i, t in zip(ids, texts, strict=True)]

        return {"tokens": await asyncio.to_thread(tokens)}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = ChatBody.read(await read_json(request))
        worker = worker_of(body.model)
        worker.check_room()
        job = worker.submit(await asyncio.to_thread(generation_request, worker.assistant, body))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            stream = events(job.deltas(request), head, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        reply = None
        try:
            async with aclosing(job.deltas(request)) as deltas:
                async for delta in deltas:
                    reply = delta.reply
        except Exception as error:
            raise internal(error) from None
        if reply is None:
            return Response(status_code=499)  # the client is gone; nobody reads this
        return JSONResponse(completion(reply, head))

    def add_page(address: str, file: str, kind: str) -> None:
        data = (Path(__file__).parent / "page" / file).read_bytes()

        @app.get(address)
        async def page() -> Response:
            return Response(data, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

    for address, (file, kind) in PAGE.items():
        add_page(address, file, kind)
    return app


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("")
    (True, True, False, False)
    """
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return bool(found) and all(ipaddress.ip_address(str(f[4][0]).partition("%")[0]).is_loopback for f in found)
    except (OSError, ValueError, UnicodeError):
        return False


def open_socket(host: str, port: int, *, api_key: str | None = None, insecure: bool = False) -> socket.socket:
    """The listening socket of a server, opened before anything slow is done.

    Raises ServeError where the host is open to others without a key, or the port is not to be had.
    """
    if not (api_key or insecure or is_loopback(host)):
        fact = "this host is open to other machines and no API key is set"
        raise ServeError(host or "--host", fact, "give --api-key, or say --insecure")
    place = f"{host}:{port}"
    if not 0 <= port <= 65535:  # getaddrinfo would quietly take it modulo 65536
        raise ServeError(place, "there is no such port", "choose one from 1 to 65535 with --port")
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT
        sock.bind(address)
        sock.listen(128)  # now, for two sockets may be bound to one port as long as neither listens
        return sock
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ServeError(place, "the port is in use", "choose another with --port") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(place, f"cannot be listened on ({reason})", "choose another with --host and --port") from None


class _Server(uvicorn.Server):
    """Ends running replies first when it is told to stop; uvicorn would wait for them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.stop_workers()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(
    assistants: Mapping[str, Assistant],
    *,
    host: str = "127.0.0.1",
    port: int = 8008,
    api_key: str | None = None,
    allow_origin: str | None = None,
    insecure: bool = False,
    say: Callable[[str], None] = print,
    sock: socket.socket | None = None,
) -> None:
    """Serve until Ctrl-C. sock: from `open_socket`, where the caller opened it before loading the models."""
    sock = sock or open_socket(host, port, api_key=api_key, insecure=insecure)
    with sock:
        hosts = LOOPBACK | {f"[{host}]" if ":" in host else host.lower()} if is_loopback(host) else None
        app = make_app(dict(assistants), api_key=api_key, allow_origin=allow_origin, hosts=hosts)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(assistants)} at http://{shown}:{sock.getsockname()[1]} (Ctrl-C stops)")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config).run(sockets=[sock])
