"""A server as a whole: models behind an address, until Ctrl-C, or beside what the program does."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sftflow.foundation.errors import RunError, SftflowError, first_line
from sftflow.serving.api import Serving, listed, make_app
from sftflow.serving.host_check import check_origins, check_root_path, host_names
from sftflow.serving.middleware import access
from sftflow.serving.uvicorn_limits import Server, config, open_socket

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant


class Service:
    """Models behind an address, from `run` or `start` to `stop`, or to the end of a `with`.   url: the address.
    models: what clients call them by."""

    def __init__(
        self,
        load: Callable[[], Mapping[str, Assistant]],
        *,
        host: str = "127.0.0.1",
        port: int = 8008,
        api_key: str | None = None,
        allow_origin: str | Iterable[str] = (),
        root_path: str = "",
        insecure: bool = False,
        allow_hosts: Iterable[str] = (),
    ) -> None:
        """load: gives the models by their names; called when all else is known to be right and the port is taken, for
        it may take minutes.   Raises ServeError, and what `load` raises."""
        origins = check_origins(listed(allow_origin))
        check_root_path(root_path)
        hosts = host_names(host, allow_hosts)
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(open_socket(host, port, api_key=api_key, insecure=insecure))
            assistants = load()
            self.models = tuple(assistants)
            app = make_app(assistants, api_key=api_key, allow_origin=origins, root_path=root_path, hosts=hosts)
            stack.pop_all()
        self._serving: Serving = app.state.serving
        self._server = Server(config(app))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}{root_path}"

    def run(self) -> None:
        """Answer until Ctrl-C. Raises what kept a model from being proven: CheckpointError, else RunError."""
        with self._socket, contextlib.suppress(KeyboardInterrupt):
            self._server.run(sockets=[self._socket])
        self._require_proven()

    def start(self) -> None:
        """Answer from a thread of its own, until `stop`; returns when the models are proven. Raises as `run`."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        threads = [model.thread for model in self._serving.models.values()]
        while self._thread.is_alive() and not (self._server.started and all(t.ready for t in threads)):
            time.sleep(0.01)
        try:
            self._require_proven()
            if not self._server.started:
                raise RunError("serve", "the server has ended before it answered")
        except SftflowError:
            self.stop()
            raise

    def stop(self) -> None:
        """End a server that was started: replies that run are cut off, and the port is free again."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Service({self.url!r}, models {', '.join(self.models)})"

    def _require_proven(self) -> None:
        error = self._serving.unproven()
        if isinstance(error, SftflowError):
            raise error
        if error is not None:
            fact = f"the model cannot be generated from ({type(error).__name__}: {first_line(error)})"
            raise RunError("serve", fact) from error


def serve(load: Callable[[], Mapping[str, Assistant]], *, say: Callable[[str], None] = print, **how: Any) -> None:
    """Serve until Ctrl-C, a line a request on stderr.   how: as for `Service`, which says what is raised."""
    service = Service(load, **how)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
    say(f"serving {', '.join(service.models)} at {service.url} (Ctrl-C stops)")
    service.run()
