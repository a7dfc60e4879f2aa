"""The listening socket and the connections on it: who can reach them, how many there are, how long each may take.

uvicorn (with h11) has a limit for idle kept-alive connections only. `Connection` adds one for a header or a body that
drips in, for a client that does not read its answer, and for the number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sftflow.foundation.errors import ServeError
from sftflow.serving.errors import ApiError
from sftflow.serving.host_check import check_key, is_loopback
from sftflow.serving.middleware import MAX_HEADERS


class Connection(H11Protocol):
    """One connection, with its limits in seconds."""

    header_seconds = 10.0
    body_seconds = 30.0
    write_seconds = 60.0
    most = 512

    _deadline: asyncio.TimerHandle | None = None
    _stage: Any = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            fact = "too many connections; try again soon"
            self._refuse(ApiError(503, fact, code="too_many_connections", Retry_After="5"))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock of a header or a body when it begins, and stop it when it is whole; what drips does not
        start it again."""
        state, cycle = self.conn.their_state, self.cycle
        begun = state is h11.IDLE and (self.conn.trailing_data[0] or cycle is None)
        stage = (state, cycle) if begun or state is h11.SEND_BODY else None
        if stage == self._stage:
            return
        self._stage = stage
        if self._deadline is not None:
            self._deadline.cancel()
        if stage is not None:
            seconds = self.header_seconds if state is h11.IDLE else self.body_seconds
            self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        part = "header" if self.conn.their_state is h11.IDLE else "body"
        self._refuse(ApiError(408, f"the request's {part} took too long", code="request_timeout"))

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

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()


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
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        server_header=False,
        proxy_headers=False,
    )


class Server(uvicorn.Server):
    """Ends running replies first when it is told to stop, for uvicorn would wait for them; and ends by itself where a
    model turns out not to be computable."""

    async def on_tick(self, counter: int) -> bool:
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
