"""From the bytes of a request to a JSON object: how large it may be, what is no JSON, how many are read at once.

    read_body (the event loop) -> ReaderPool.run (a thread): parse_json -> the route's schema -> its prompts

Anything wrong is an ApiError.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from sftflow.serving.errors import ApiError

MAX_BODY = 2 * 1024 * 1024
LARGE = 16 * 1024
"""bytes of a body from which on its reading may take long: the time grows with the square of the messages"""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
T = TypeVar("T")


class Pace:
    """Lets so many bytes a second through, of all that share it, after a burst that need not wait: receiving two
    megabytes takes as long as answering dozens of small requests, which would wait behind them.

    >>> pace = Pace(per_second=100, burst=1000)
    >>> pace.delay(900), round(pace.delay(200))
    (0.0, 1)
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst / per_second
        self._next = 0.0

    def delay(self, n: int) -> float:
        """Take n bytes; seconds until the next may be taken."""
        now = time.monotonic()
        self._next = max(self._next, now - self._burst) + n / self._per_second
        return max(0.0, self._next - now)


BODIES = Pace(per_second=16 << 20, burst=4 << 20)
"""of large bodies that are read"""


async def read_body(request: Request) -> bytes:
    """The body. Raises ApiError 413 or 415 without waiting for the rest of it, which the connection throws away."""
    kind = request.headers.get("content-type", "")
    mime, _, parameters = kind.lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters)
    # A page elsewhere may post text/plain or a form here unasked, but not JSON: so nothing else is read as JSON.
    json_like = mime.strip() == "application/json" or (mime.strip().startswith("application/") and "+json" in mime)
    if (kind and not json_like) or (charset and charset.group(1) not in ("utf-8", "utf8", "us-ascii")):
        raise ApiError(415, "send JSON in UTF-8 with Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ApiError(415, "compressed bodies are not read; send it as it is", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY >> 20} MB", code="body_too_large")
    if length.isdecimal() and int(length[:20]) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_large
        if len(chunk) >= LARGE:
            await asyncio.sleep(BODIES.delay(len(chunk)))  # meanwhile uvicorn reads no further than its buffer
    return bytes(body)


class ReaderPool:
    """Runs the reading of bodies in threads, for parsing, rendering and encoding one may take seconds of a core; large
    ones have places of their own, so that small ones do not wait for them.

    small, large: how many of each at once.   seconds: that one waits for its place.
    """

    def __init__(self, *, small: int = 4, large: int = 2, seconds: float = 10.0) -> None:
        self._small, self._large, self._seconds = asyncio.Semaphore(small), asyncio.Semaphore(large), seconds

    async def run(self, work: Callable[[], T], n_bytes: int) -> T:
        """What `work` returns. Raises what it raises, or ApiError 503 where no place came free."""
        places = self._large if n_bytes >= LARGE else self._small
        try:
            await asyncio.wait_for(places.acquire(), self._seconds)
        except TimeoutError:
            fact = "too many requests are being read; try again soon"
            raise ApiError(503, fact, code="reading_full", Retry_After="5") from None
        done = asyncio.ensure_future(asyncio.to_thread(work))
        done.add_done_callback(lambda _: places.release())
        return await asyncio.shield(done)  # a client that leaves does not end the thread, so its place is still taken


def parse_json(data: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises ApiError 400: not JSON, not UTF-8, NaN, half a surrogate pair (no tokenizer takes
    it), a key twice in one object (readers differ in which they take), a number of thousands of digits."""

    def no_constant(name: str) -> Any:
        raise _not_json(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _not_json("a key stands twice in one object")
        return found

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=once)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "the body is not text in UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at character {error.pos}") from None
    except ValueError:
        raise _not_json("a number has thousands of digits") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return value


def _not_json(fact: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {fact}", code="invalid_json")
