"""What the measurements of a server share: the server as a process, one streaming client, and a stopwatch on /health.

    with served([sys.executable, "-m", "sftflow", "serve", MODEL, "--port", "0"]) as server:
        streamed = asyncio.run(ask_once(server.url, body))

Everything talks to 127.0.0.1 and ends by itself.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 180.0
TRIES = 24


@dataclass(frozen=True)
class Server:
    """url: without a slash at the end.   model: the name to ask for."""

    url: str
    pid: int
    model: str

    def resident_mib(self) -> float:
        """Memory that the process holds now. Linux."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@contextmanager
def served(command: Sequence[str], *, port: int = 0, model: str | None = None) -> Iterator[Server]:
    """Start a server and wait until it answers /health; ended when the block is left.

    port: where it will listen; 0: it says so itself, as `sftflow serve` does.   model: the name it is asked for; else
    the first that it lists. Raises RuntimeError, with the end of what it said, where it does not come up.
    """
    with tempfile.NamedTemporaryFile() as log:
        said = Path(log.name)  # read through a handle of its own: the server writes at the offset of this one
        process = subprocess.Popen(list(command), stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            url = f"http://127.0.0.1:{port}" if port else ""
            until = time.monotonic() + START_SECONDS
            while not (url and _healthy(url)):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(command)} did not come up:\n{said.read_text()[-2000:]}")
                time.sleep(0.1)
                url = url or next(iter(re.findall(r"http://127\.0\.0\.1:\d+", said.read_text())), "")
            model = model or httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            yield Server(url, process.pid, model)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve_command(model: str, *options: str) -> list[str]:
    """The command line of our own server, on a port that it finds."""
    return [sys.executable, "-m", "sftflow", "serve", model, "--port", "0", *options]


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One answer. first: seconds until its first text.   came: when each of its texts came.   tokens: as the server
    counts them, 0 where it did not say.
    retry_after: what a refusal asked for, None where it asked for nothing.   error: what went wrong besides."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    first: float = 0.0
    came: list[float] = field(default_factory=list)
    seconds: float = 0.0
    retry_after: float | None = None
    error: str | None = None


def client(n: int) -> httpx.AsyncClient:
    """A client with a connection for each of n askers."""
    return httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=n, max_keepalive_connections=n))


async def stream_chat(web: httpx.AsyncClient, url: str, body: dict[str, Any], *, leave: bool = False) -> Streamed:
    """Ask for one chat reply as a stream. leave: hang up at its first text.

    Never raises for what the server does: a refusal, a broken stream and an error event stand in the result.
    """
    began = time.perf_counter()
    got: dict[str, Any] = {}
    text: list[str] = []
    came: list[float] = []
    try:
        async with web.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
            got["status"] = response.status_code
            if response.status_code != 200:
                wait = response.headers.get("retry-after")
                got["retry_after"] = float(wait) if wait is not None else None
                got["error"] = (await response.aread()).decode("utf-8", "replace")[:300]
                return Streamed(seconds=time.perf_counter() - began, **got)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    continue  # read on to the end, else the connection is not kept
                chunk = json.loads(data)
                if "error" in chunk:
                    got["error"] = json.dumps(chunk["error"])
                    break
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content")
                    if piece and not text:
                        got["first"] = time.perf_counter() - began
                    if piece:
                        text.append(piece)
                        came.append(time.perf_counter())
                    got["finish"] = choice.get("finish_reason") or got.get("finish")
                if chunk.get("usage"):
                    got["tokens"] = chunk["usage"]["completion_tokens"]
                if leave and text:
                    break
    except httpx.HTTPError as error:
        got["error"] = f"{type(error).__name__}: {error}"
    if not (got.get("finish") or leave or "error" in got):
        got["error"] = "the stream ended without a finish_reason"
    return Streamed(text="".join(text), came=came, seconds=time.perf_counter() - began, **got)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else float("nan")


class HealthProbe:
    """Asks /health every `every` seconds, from a process of its own: in the clients' process it would measure them.

    with HealthProbe(url) as probe: ...load...
    probe.seconds                       how long each answer took; a failed one counts as 10 s
    """

    def __init__(self, url: str, every: float = 0.05) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._out: Any = self._context.SimpleQueue()
        self._process = self._context.Process(target=_probe, args=(url, every, self._stop, self._out), daemon=True)
        self.seconds: list[float] = []

    def __enter__(self) -> HealthProbe:
        self._process.start()
        self._out.get()  # it is up: the load need not wait for an interpreter to start
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.seconds = self._out.get()
        self._process.join(20)

    def told(self) -> str:
        p50, p99 = (1000 * percentile(self.seconds, share) for share in (0.5, 0.99))
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1000 * max(self.seconds):.1f} ms ({len(self.seconds)} asked)"


def _probe(url: str, every: float, stop: Event, out: Any) -> None:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    out.put(None)
    took: list[float] = []
    while not stop.is_set():
        began = time.perf_counter()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            took.append(time.perf_counter() - began if answer.status == 200 else 10.0)
        except OSError:
            took.append(10.0)
            connection.close()
        time.sleep(every)
    connection.close()
    out.put(took)


async def retried(web: httpx.AsyncClient, url: str, body: dict[str, Any], *, leave: bool = False) -> list[Streamed]:
    """Ask until it is answered, waiting as long as a refusal with 503 and Retry-After says, TRIES times at most: all
    that was heard."""
    heard: list[Streamed] = []
    while len(heard) < TRIES:
        heard.append(await stream_chat(web, url, body, leave=leave))
        wait = heard[-1].retry_after
        if heard[-1].status != 503 or wait is None:
            break
        await asyncio.sleep(wait)
    return heard


def questions(n: int) -> list[list[dict[str, str]]]:
    """n chats of one question each, from the built-in tasks that want no calculator."""
    from sftflow.evaluation.options import open_tasks

    items = [i for run in open_tasks(["concepts", "identity"], n) for i in run.items]
    asked = [[{"role": m.role, "content": m.text} for m in item.messages] for item in items]
    return [asked[i % len(asked)] for i in range(n)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
