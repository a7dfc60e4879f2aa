"""The listening socket and the connections on it: who can reach them, how many there are, how long each may take.

uvicorn (with h11) has a limit for idle kept-alive connections only, and forgets it at the first byte that follows.
`Connection` has one for everything that a client can be waited for, and for the number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import sys
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sftflow.foundation.errors import ServeError
from sftflow.serving.errors import ApiError
from sftflow.serving.host_check import check_key, is_loopback
from sftflow.serving.middleware import MAX_HEADERS
from sftflow.serving.request_body import LARGE, Pace


class Gathering:
    """A transport that sends at once what is written in one turn of the event loop: the head and the body of an answer
    are one packet, so that a client that reads once has both."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if data and not self._held:
            self._loop.call_soon(self._send)
        self._held += [data] if data else []

    def _send(self) -> None:
        data, self._held = b"".join(self._held), []
        if data:
            self._transport.write(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def abort(self) -> None:
        self._held = []
        self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """One connection. Whenever it is the client that is waited for, a clock runs: seconds for a header or a body that
    has begun (what drips does not start it again), for the next request, for a client that does not read. Of more than
    `most` connections the longest waited for is closed; one that is answered is not, nor while its body is on its way
    if it has shown the key."""

    header_seconds = 10.0
    body_seconds = 30.0
    idle_seconds = 30.0
    write_seconds = 60.0
    most = 512
    thrown_away = Pace(per_second=32 << 20, burst=8 << 20)

    _waited_for: tuple[str, object] | None = None
    _since = 0.0
    _pauses = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = Gathering(transport, self.loop)  # type: ignore[assignment]
        self.look()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self.look()
            if (
                self.conn.our_state is h11.DONE and len(data) >= LARGE
            ):  # of a body that was answered, and is thrown away
                self.flow.pause_reading()
                self.loop.call_later(self.thrown_away.delay(len(data)), self.flow.resume_reading)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pauses += 1

    def look(self) -> None:
        """Start the clock of what is waited for, or end the connection where it has run out; called at every event, and
        by the server's tick."""
        now, waited_for = self.loop.time(), self._waiting()
        if waited_for != self._waited_for:
            self._waited_for, self._since = waited_for, now
        elif waited_for is not None and now - self._since >= getattr(self, f"{waited_for[0]}_seconds"):
            self._end(waited_for[0])

    def _waiting(self) -> tuple[str, object] | None:
        """What the client is waited for, and which one of its kind; None while we are computing."""
        state, cycle = self.conn.their_state, self.cycle
        if self.transport.is_closing() or self.flow.write_paused:  # closing waits until all is written
            return "write", self._pauses
        if state is h11.SEND_BODY:
            return "body", cycle
        if state is h11.IDLE and (self.conn.trailing_data[0] or cycle is None):
            return "header", cycle
        return ("idle", cycle) if cycle is None or cycle.response_complete else None

    def _end(self, waited_for: str) -> None:
        if waited_for == "write":
            self.transport.abort()
        elif waited_for == "idle":
            self.transport.close()
        else:
            self._refuse(ApiError(408, f"the request's {waited_for} took too long", code="request_timeout"))

    def _make_room(self) -> None:
        """Close the connection that is waited for the longest, those that have not shown the key first."""
        idle = [c for c in self.connections if c is not self and isinstance(c, Connection) and not c._is_answered()]
        if idle:
            longest = min(idle, key=lambda c: (c._admitted() == "key", c._since))
            self.connections.discard(longest)  # from now on: others may come before it is told that it is lost
            longest.transport.abort()
        else:
            fact = "too many connections; try again soon"
            self._refuse(ApiError(503, fact, code="too_many_connections", Retry_After="5"))

    def _is_answered(self) -> bool:
        if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
            return False
        admitted = self._admitted()
        return admitted == "key" or (admitted == "open" and self.conn.their_state is not h11.SEND_BODY)

    def _admitted(self) -> str | None:
        """See `middleware.Auth`."""
        return self.scope["state"].get("admitted") if self.scope else None

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, in our shape."""
        if len(self.conn.trailing_data[0]) > MAX_HEADERS:
            fact = f"the headers are larger than {MAX_HEADERS >> 10} KB"
            self._refuse(ApiError(431, fact, code="headers_too_large"))
            return
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, where nothing has been answered yet, and hang up."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its route learns it as if the client had left
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers += [*error.headers.items(), ("connection", "close")]
            events = (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            # Its state may allow no answer any more; hanging up is all that is left then.
            with contextlib.suppress(h11.LocalProtocolError):
                for event in events:
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def config(app: Any, connection: type[Connection] = Connection) -> uvicorn.Config:
    """How uvicorn is run: our connections, no WebSocket, its own log only for what goes wrong."""
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=round(connection.idle_seconds),
        timeout_graceful_shutdown=2,
        server_header=False,
        proxy_headers=False,
    )


SWITCH_SECONDS = 0.0005
"""how long a thread that reads a large body may keep the event loop waiting; Python's own 5 ms make several of one
small request"""


class Server(uvicorn.Server):
    """Looks after its connections; ends running replies first when it is told to stop, for uvicorn would wait for them;
    and ends by itself where a model turns out not to be computable."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            super().run(sockets)
        finally:
            sys.setswitchinterval(before)

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:  # twice a second
            for connection in tuple(self.server_state.connections):
                connection.look()  # type: ignore[union-attr]
        return await super().on_tick(counter) or self.config.app.state.serving.unproven() is not None  # type: ignore[union-attr]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.serving.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def open_socket(host: str, port: int, *, api_key: str | None = None, insecure: bool = False) -> socket.socket:
    """The listening socket of a server, opened before anything slow is done.

    Raises ServeError where the key cannot be sent, the host is open to others without one, or the port is not to be
    had.
    """
    check_key(api_key)
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
        sock.listen(512)  # now, for two sockets may be bound to one port as long as neither listens
        return sock
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ServeError(place, "the port is in use", "choose another with --port") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(place, f"cannot be listened on ({reason})", "choose another with --host and --port") from None
