"""Around every route: who may ask (`Auth`), what is remembered of it (`RequestLog`: request ids, access log, metrics),
and what is said where we fail (`UnforeseenErrors`).

    client -> RootPath, where there is one -> RequestLog -> CORS, where an origin is allowed -> UnforeseenErrors -> Auth
    -> route
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Container
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sftflow.serving.errors import ApiError
from sftflow.serving.metrics import Metrics

MAX_HEADERS = 32 * 1024
log, access = logging.getLogger("sftflow.serving"), logging.getLogger("sftflow.access")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class Auth:
    """Refuses a request before any route sees it: by its Host, its Origin, its key.

    free: paths that need no key.   hosts: Host names that are served.   A request to another path that may go on is
    marked in its state as `admitted`: "key", or "open" where none is asked for.
    """

    app: ASGIApp
    api_key: str | None
    allow_origins: Container[str]
    hosts: Container[str]
    free: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["path"])
                if scope["path"] not in self.free:
                    scope["state"]["admitted"] = "open" if self.api_key is None else "key"
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADERS:
            raise ApiError(431, f"the headers are larger than {MAX_HEADERS >> 10} KB", code="headers_too_large")
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        # A page elsewhere can point its own name at this machine (DNS rebinding): its name then stands here, and in its
        # Origin, too.
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name not in self.hosts:
            fact = "this Host is not served here; use localhost or the server's address, or see --allow-host"
            raise ApiError(403, fact, code="host_not_allowed")
        # Any page can post blindly to an address that its reader's browser reaches, without being able to read the
        # answer; its origin then stands here.
        allowed = origin is None or "*" in self.allow_origins or origin in self.allow_origins
        if not allowed and _netloc(origin or "") != host:
            raise ApiError(403, "this Origin is not allowed; see --allow-origin", code="origin_not_allowed")
        if self.api_key is not None and path not in self.free:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip(" \t").encode("latin-1", "replace"), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "a missing or wrong API key; send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


@dataclass
class RootPath:
    """Takes off the path below which a proxy shows the server, where the proxy has left it on.

    root_path: such as `/llm`.
    """

    app: ASGIApp
    root_path: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{self.root_path}/"):
            if scope["path"] == self.root_path:  # the page's own addresses are relative: they need the slash
                await RedirectResponse(f"{self.root_path}/", 308)(scope, receive, send)
                return
            scope["path"] = scope["path"].removeprefix(self.root_path)
        await self.app(scope, receive, send)


@dataclass
class UnforeseenErrors:
    """Answers where a route raises what nobody foresaw. It stands inside `RequestLog` and CORS, so that this answer has
    their headers, too; starlette's own handler of such errors stands outside of both."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if started or scope["type"] != "http":
                raise  # too late for an answer: the connection is cut, which tells the client
            log.error("an unforeseen error", exc_info=error)
            answer = ApiError(500, "an internal error; the server's log says more", code="internal_error").response()
            await answer(scope, receive, send)


@dataclass
class Record:
    """What the log says of one request, and no contents. Times by time.perf_counter."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    model: str = ""
    n_prompt: int = 0
    n_generated: int = 0


@dataclass
class RequestLog:
    """Gives every request an id (the client's own where it is a plain word), and tells log and metrics how it was
    answered. Routes find the `Record` in their request's state."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        theirs = Headers(scope=scope).get("x-request-id", "")
        record = Record(theirs if _SANE_ID.fullmatch(theirs) else f"req_{uuid.uuid4().hex}")
        scope.setdefault("state", {})["record"] = record
        status = 499  # until somebody answers: the client was gone before

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500  # whatever its first line said
            raise
        finally:
            seconds = time.perf_counter() - record.began
            self.metrics.answered(getattr(scope.get("route"), "path", "none"), status, seconds)
            if access.isEnabledFor(logging.INFO):
                access.info(_line(scope, record, status, seconds))


def _line(scope: Scope, record: Record, status: int, seconds: float) -> str:
    """127.0.0.1 POST /v1/chat/completions 200 0.312s model=demo prompt=14 generated=24 id=req_5a..."""
    # What a client wrote is shown in ASCII on one line, and not all of it.
    path = scope["path"].encode("unicode_escape").decode()[:120].replace(" ", "%20")
    client = (scope.get("client") or ("-",))[0]
    asked = f" model={record.model} prompt={record.n_prompt} generated={record.n_generated}" if record.model else ""
    return f"{client} {scope['method'][:16]} {path} {status} {seconds:.3f}s{asked} id={record.id}"
