"""The OpenAI layer: `/v1/chat/completions` (plain and streamed), `/v1/models`, our own `/v1/render`, and the page.

    client -> _Guard (host, origin, key) -> route -> renderer (a thread) -> _Worker (one thread a model) -> engine

The engine is not re-entrant, so each model has one worker thread and a bounded line in front of it; the event loop
only ever waits. A client that leaves takes its work with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import logging
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from sftflow.chat.schema import parse_row
from sftflow.errors import ContextError, ServeError, SftflowError
from sftflow.generate import engine as generation
from sftflow.serve.terminal import own_sampling

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

MAX_BODY = 2 * 1024 * 1024
MAX_WAITING = 64
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Known fields of the OpenAI shape that we do not do: each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
log = logging.getLogger("sftflow.serve")


class ApiError(Exception):
    """An answer in the OpenAI error shape: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]  # an empty stop text would end every reply


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class RenderBody(BaseModel):
    """POST /v1/render."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str
    messages: list[Any] = Field(min_length=1)

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Check a JSON object. Raises ApiError 400 naming the field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            param = str(first["loc"][0])
            raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


class ChatBody(RenderBody):
    """POST /v1/chat/completions: what we read of the OpenAI shape; null means the same as left out."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None


class _Job:
    """One generation: the worker's thread puts deltas in, the event loop takes them out."""

    def __init__(self, request: generation.Request) -> None:
        self.request = request
        self.cancelled = Event()
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[generation.Delta | Exception | None] = asyncio.Queue()

    def put(self, item: generation.Delta | Exception | None) -> None:
        """From the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def cancel(self) -> None:
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()  # if it still waits in line, it never starts
        self._queue.put_nowait(None)

    async def deltas(self, request: Request) -> AsyncIterator[generation.Delta]:
        """The reply piece by piece; ends early, and ends the work, when the client is gone."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.1)
            self.cancel()

        watcher = asyncio.create_task(watch())
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            watcher.cancel()
            self.cancel()


class _Worker:
    """One model's thread and the line in front of it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.jobs: set[_Job] = set()  # the one that runs and those that wait
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sftflow-engine")

    def check_room(self) -> None:
        if len(self.jobs) > MAX_WAITING:
            raise ApiError(429, "too many requests are waiting; try again soon", code="queue_full", Retry_After="5")

    def submit(self, request: generation.Request) -> _Job:
        """Put a request in line. Raises ApiError 429 where more than MAX_WAITING wait already."""
        self.check_room()
        job = _Job(request)
        self.jobs.add(job)
        job.future = self._pool.submit(self._work, job)
        job.future.add_done_callback(lambda _: self.jobs.discard(job))
        return job

    def _work(self, job: _Job) -> None:
        try:
            with contextlib.closing(self.assistant.engine.stream(job.request)) as stream:  # type: ignore[type-var]
                for delta in stream:
                    if job.cancelled.is_set():
                        return
                    job.put(delta)
        except Exception as error:
            job.put(error)
        finally:
            job.put(None)

    def close(self) -> None:
        """End every reply, at the latest after its next token."""
        for job in list(self.jobs):
            job.put(ApiError(503, "the server is stopping", code="stopping"))
            job.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


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


async def _read_json(request: Request) -> dict[str, Any]:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY:
            body += chunk
        elif size > 16 * MAX_BODY:
            break
        # else: read on and throw away, for a client that is still writing would not see our answer
    if size > MAX_BODY:
        raise ApiError(413, "the body is larger than 2 MB", code="body_too_large")

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no tokenizer takes it
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON in UTF-8", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return value


def prompt_ids(assistant: Assistant, messages: Sequence[Any]) -> tuple[int, ...]:
    """OpenAI messages -> the exact ids that the model is given. Raises ApiError 400."""
    raw = []
    for message in messages:
        if isinstance(message, dict):  # clients send back what they got, with its empty fields (refusal: null ...)
            message = {k: v for k, v in message.items() if k == "content" or (v is not None and v != [])}
        raw.append(message)
    try:
        ids = assistant.renderer.render(parse_row({"messages": raw}, "request"), reply=True).ids.tolist()
    except SftflowError as error:
        param = error.place.removeprefix("request").lstrip(".") or "messages"
        message = f"{param}: {error.fact}" + (f"; {error.remedy}" if error.remedy else "")
        raise ApiError(400, message, param=param, code="invalid_messages") from None
    if len(ids) >= assistant.engine.context:
        raise _too_long(len(ids), assistant.engine.context)
    return tuple(ids)


def _too_long(n_prompt: int, context: int) -> ApiError:
    message = f"the messages are {n_prompt} tokens, the model's context is {context}; shorten them"
    return ApiError(400, message, param="messages", code="context_length_exceeded")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the decoded prompt. A character that several tokens share stands with
    the last of them, and the others are empty."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    before: list[int] = []  # the token in front, for some tokenizers drop the leading space of what they decode
    pending: list[int] = []
    for number, token in enumerate(ids):
        pending.append(token)
        text = decode(before + pending)[len(decode(before)) :]
        if text.endswith("\ufffd") and len(pending) < 4 and number + 1 < len(ids):
            texts.append("")
        else:
            texts.append(text)
            before, pending = pending, []
    return texts


def _generation_request(assistant: Assistant, body: ChatBody) -> generation.Request:
    ids = prompt_ids(assistant, body.messages)
    own = own_sampling(assistant)
    temperature = own["temperature"] if body.temperature is None else body.temperature
    top_p = own["top_p"] if body.top_p is None else body.top_p
    limit = body.max_completion_tokens or body.max_tokens or assistant.engine.context
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return generation.Request(
        prompt_ids=ids,
        max_new_tokens=min(limit, assistant.engine.context - len(ids)),
        temperature=temperature if temperature >= 1e-4 else 0.0,  # the limit of ever smaller ones, without overflow
        top_p=max(top_p, 1e-6),
        top_k=max(own["top_k"] if body.top_k is None else body.top_k, 0),  # -1 is vLLM's "off"
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_texts=tuple(stop),
    )


def _usage(reply: generation.Reply) -> dict[str, int]:
    n_prompt, n_completion = reply.n_prompt, len(reply.ids)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def _internal(error: Exception) -> ApiError:
    """What a client may know of an engine failure; the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, error.fact, param="messages", code="context_length_exceeded")
    log.error("generation failed", exc_info=error)
    return ApiError(500, "the generation failed; the server's log says why", code="generation_failed")


async def _events(job: _Job, request: Request, head: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """The OpenAI event stream of one reply."""

    def event(data: dict[str, Any]) -> str:
        # ASCII only: readers that split lines as Python does would break events at U+2028 and its like.
        return f"data: {json.dumps(data)}\n\n"

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async with aclosing(job.deltas(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                if delta.text:
                    yield chunk({"content": delta.text})
                if delta.reply is not None:
                    yield chunk({}, delta.reply.finish_reason)
                    if include_usage:
                        yield event({**head, "choices": [], "usage": _usage(delta.reply)})
                    yield "data: [DONE]\n\n"
    except Exception as error:  # the status line is long gone; the OpenAI clients raise on this event
        yield event(_internal(error).body)


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
    workers = {name: _Worker(assistant) for name, assistant in assistants.items()}
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

    def worker_of(model: str) -> _Worker:
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
        body = RenderBody.read(await _read_json(request))
        assistant = worker_of(body.model).assistant
        special = set(assistant.renderer.special.values())

        def tokens() -> list[dict[str, Any]]:
            ids = prompt_ids(assistant, body.messages)
            texts = token_texts(assistant.tokenizer, ids)
            return [{"id": i, "text": t, "special": i in special} for i, t in zip(ids, texts, strict=True)]

        return {"tokens": await asyncio.to_thread(tokens)}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        raw = await _read_json(request)
        body = ChatBody.read(raw)
        for field, nothing in UNSUPPORTED.items():
            if raw.get(field) not in nothing:
                raise ApiError(400, f"{field} is not supported here", param=field, code="unsupported_parameter")
        worker = worker_of(body.model)
        worker.check_room()
        job = worker.submit(await asyncio.to_thread(_generation_request, worker.assistant, body))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _events(job, request, {**head, "object": "chat.completion.chunk"}, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        reply = None
        try:
            async with aclosing(job.deltas(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    reply = delta.reply
        except Exception as error:
            raise _internal(error) from None
        if reply is None:
            return Response(status_code=499)  # the client is gone; nobody reads this
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)})

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
