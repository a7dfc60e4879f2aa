"""A small OpenAI-shaped server of the tests' own, which says what a test wants said: the page's other end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sftflow.serving import api

FILES = Path(api.__file__).parent / "page"


class Peer(ThreadingHTTPServer):
    """say: the reply of every model, think: its thoughts. pieces of `size` characters, `delay` seconds apart; ends with
    `reason`, or breaks off where that is None. error: (status, message) instead of a reply. key: asked for on /v1.
    left: clients that went while they were answered."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.models = ["sft", "base"]
        self.say, self.size, self.delay = "Hello.", 4, 0.0
        self.think = ""
        self.reason: str | None = "stop"
        self.error: tuple[int, str] | None = None
        self.key = ""
        self.left = 0
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Peer

    def log_message(self, *_: Any) -> None: ...

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in api.PAGE_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _refused(self) -> bool:
        if not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return False
        self._json({"error": {"message": "a missing or wrong API key"}}, 401)
        return True

    def do_GET(self) -> None:
        if self.path in api.PAGE:
            file, kind = api.PAGE[self.path]
            self._send(200, kind, (FILES / file).read_bytes())
        elif self.path == "/v1/models":
            if not self._refused():
                self._json({"data": [{"id": name} for name in self.server.models]})
        else:
            self._json({"error": {"message": "no such address"}}, 404)

    def do_POST(self) -> None:
        peer = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        peer.bodies.append(body)
        if peer.error:
            self._json({"error": {"message": peer.error[1]}}, peer.error[0])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = [
            {key: text[i : i + peer.size]}
            for key, text in (("reasoning_content", peer.think), ("content", peer.say))
            for i in range(0, len(text), peer.size)
        ]
        try:
            for piece in pieces:
                self._event({"choices": [{"index": 0, "delta": piece, "finish_reason": None}]})
                time.sleep(peer.delay)
            if peer.reason is None:
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": peer.reason}]})
            self._event({"choices": [], "usage": {"completion_tokens": len(pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            peer.left += 1

    def _event(self, value: Any) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def serving(port: int = 0) -> Iterator[Peer]:
    peer = Peer(port)
    thread = threading.Thread(target=peer.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        peer.shutdown()
        peer.server_close()
        thread.join(5)
