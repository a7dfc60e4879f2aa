"""A server under people who mean it no good: connections that fall silent, bodies that are far too long.

    python benchmarks/strangers.py [--model builtin:tiny] [--silent 600] [--senders 6] [--seconds 15]

`--silent` connections ask without the key, get their 401 before their body is whole, send it, and say no more; then
`--senders` clients with the key send 1.9 MB of one message each, again and again. Before and during both, /health
without a key (20 times a second, from a process of its own) and small chats under the key, one by one. Checked, and
printed with its number:

    silent        /health and the chats are all answered; every connection is closed within the idle limit
    too long      every body is refused with `context_length_exceeded`; /health p50 at most three times that before

Exits 1 where one fails. It needs `--silent` file descriptors, and so many for the server.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import socket
import sys
import threading
import time
from collections import Counter
from typing import Any

from load import HealthProbe, Server, percentile, serve_command, served
from record import begin

from sftflow.serving.uvicorn_limits import Connection

KEY = "k"
failed: list[str] = []
facts: dict[str, str] = {}


def check(name: str, good: bool, told: str) -> None:
    print(f"{'ok    ' if good else 'FAILED'} {name}: {told}", flush=True)
    facts[name] = told if good else f"FAILED: {told}"
    if not good:
        failed.append(name)


def post(host: str, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def chat(model: str, content: str) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 1}
    return json.dumps(asked).encode()


class Watch:
    """/health and small chats while its block runs. told(): both as text.   failures: chats that were not answered."""

    def __init__(self, server: Server, model: str) -> None:
        self.health, self.chats, self.failures = HealthProbe(server.url), [0.0][:0], 0
        self._host, self._body, self._stop = server.url.removeprefix("http://"), chat(model, "hi"), threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            try:
                good = post(self._host, "/v1/chat/completions", self._body)[0] == 200
            except (OSError, http.client.HTTPException):
                good = False
            self.chats.append(time.perf_counter() - began)
            self.failures += not good
            time.sleep(0.05)

    def __enter__(self) -> Watch:
        self.health.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.health.__exit__()

    def figures(self) -> dict[str, float]:
        pairs = [("health", self.health.seconds), ("chat", self.chats)]
        return {f"{name}_p{p}_ms": 1000 * percentile(took, p / 100) for name, took in pairs for p in (50, 99)}

    def told(self) -> str:
        p50, p99 = (1000 * percentile(self.chats, share) for share in (0.5, 0.99))
        small = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(self.chats)} asked, {self.failures} failed)"
        return f"/health {self.health.told()}; small chats {small}"


def fall_silent(host: str, n: int) -> list[socket.socket]:
    """Connections that were answered 401 before their body was whole, and then sent it."""
    name, port = host.split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    )
    held = []
    for _ in range(n):
        raw = socket.create_connection((name, int(port)), timeout=20)
        raw.sendall(head.encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 401 ")
        raw.sendall(b"{}")
        held.append(raw)
    return held


def n_open(held: list[socket.socket]) -> int:
    still = 0
    for raw in held:
        raw.setblocking(False)
        with contextlib.suppress(ConnectionError):
            try:
                while raw.recv(4096):
                    pass
            except BlockingIOError:
                still += 1
    return still


def silent(server: Server, model: str, n: int) -> Watch:
    held = fall_silent(server.url.removeprefix("http://"), n)
    limit = Connection.idle_seconds + 5
    with Watch(server, model) as watch:
        time.sleep(limit)
    print(f"       during {n} silent connections: {watch.told()}")
    answered = not watch.failures and max(watch.health.seconds) < 10
    check("silent", answered, "/health and the chats were answered" if answered else watch.told())
    left = n_open(held)
    check("closed", not left, f"{left} of {n} are open after {limit:.0f} s")
    for raw in held:
        raw.close()
    return watch


def send_far_too_long(host: str, model: str, seconds: float, out: Any) -> None:
    """One sender, in a process of its own; puts how often it was answered how."""
    body, heard, until = chat(model, "w" * 1_900_000), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < until:
        status, answer = post(host, "/v1/chat/completions", body)
        heard[f"{status} {json.loads(answer).get('error', {}).get('code')}"] += 1
    out.put(heard)


def too_long(server: Server, model: str, senders: int, seconds: float, before: Watch) -> Watch:
    context = multiprocessing.get_context("spawn")
    out: Any = context.SimpleQueue()
    asked = (server.url.removeprefix("http://"), model, seconds + 3, out)
    processes = [context.Process(target=send_far_too_long, args=asked, daemon=True) for _ in range(senders)]
    for process in processes:
        process.start()
    time.sleep(2)
    with Watch(server, model) as watch:
        time.sleep(seconds - 1)
    heard = sum((out.get() for _ in processes), Counter[str]())
    print(f"       during {senders} senders of 1.9 MB: {watch.told()}")
    check("refused", set(heard) == {"400 context_length_exceeded"}, f"{dict(heard)}")
    p50, was = (percentile(w.health.seconds, 0.5) for w in (watch, before))
    check("/health p50", p50 <= 3 * was, f"{1000 * p50:.1f} ms, {p50 / was:.1f} times that before")
    check("small chats", not watch.failures, f"{watch.failures} failed")
    return watch


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--silent", type=int, default=600)
    parser.add_argument("--senders", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15)
    small = {"silent": 60, "senders": 2, "seconds": 5.0}
    args, record = begin(parser, "strangers", rounds=1, small=small, compared="chat_p50_ms")
    for _ in record.turns():
        for way, watch in watched(args).items():
            record.add(way, watch.figures())
    record.facts |= facts
    record.finish()
    print(f"failed: {', '.join(failed)}" if failed else "all good")
    return 1 if failed else 0


def watched(args: argparse.Namespace) -> dict[str, Watch]:
    # The names of the models are behind the key, too; a name with a slash is the hub's.
    with served(serve_command(args.model, "--api-key", KEY), model="?") as server:
        host = server.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        model = json.loads(connection.getresponse().read())["data"][0]["id"]
        connection.close()
        post(host, "/v1/chat/completions", chat(model, "hi"))
        with Watch(server, model) as before:
            time.sleep(args.seconds)
        print(f"       before: {before.told()}")
        long = too_long(server, model, args.senders, args.seconds, before)
        return {"sftflow": before, f"{args.senders} senders of 1.9 MB": long,
                f"{args.silent} silent connections": silent(server, model, args.silent)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
