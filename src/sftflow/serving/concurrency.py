"""Places for reading requests: parsing, rendering and encoding one may take seconds of a core, so few do it at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sftflow.serving.errors import ApiError

LARGE = 16 * 1024
"""bytes of a body from which on its reading may take long: the time grows with the square of the messages"""
T = TypeVar("T")


class Reading:
    """Runs the reading of bodies in threads, large ones by themselves so that small ones do not wait for them.

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
