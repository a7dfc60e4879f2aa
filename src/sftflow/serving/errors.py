"""What a client is told when something is wrong: always {"error": {"message", "type", "param", "code"}}.

A user's mistake is a 4xx that names the field; what failed inside is a 500 that says nothing of the inside.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sftflow.foundation.errors import ContextError, GrammarError

log = logging.getLogger("sftflow.serving")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# A 404 must not read as if a model were missing: clients would look for another one.
_SAID = {
    404: ("this address is not offered; chats are at /v1/chat/completions", "unsupported_endpoint"),
    405: ("this address does not take this method", "unsupported_method"),
}
MOST = 600
"""characters of a message: what a client sent may be quoted, but a megabyte of it is not sent back"""


class ApiError(Exception):
    """An answer in the OpenAI error shape.

    >>> ApiError(400, "it is -1", param="n", code="invalid_value", Retry_After="5").headers
    {'Retry-After': '5'}
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
        param = _clipped(param, 120) if param else param
        self.body = {"error": {"message": _clipped(message, MOST), "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def _clipped(text: str, most: int) -> str:
    """The text, no longer than that, and without half surrogate pairs, which no JSON in UTF-8 can hold."""
    text = text if len(text) <= most else f"{text[: most - 2]} …"
    return text.encode("utf-8", "replace").decode()


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names its field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def internal(error: Exception) -> ApiError:
    """What a client may know of an engine failure; the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, error.fact, param="messages", code="context_length_exceeded")
    if isinstance(error, GrammarError):
        return wrong(error.place, error.fact, "invalid_schema")
    log.error("generation failed", exc_info=error)
    return ApiError(500, "the generation failed; the server's log says why", code="generation_failed")


def add_error_handlers(app: FastAPI) -> None:
    """Whatever goes wrong is told in the one shape; what nobody foresaw is `UnforeseenErrors`' of the middleware."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message, code = _SAID.get(error.status_code, (str(error.detail), None))
        answer = ApiError(error.status_code, message, code=code).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads this
