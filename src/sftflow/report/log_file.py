"""What a run has said, in a file of its directory: a time and a line, as they came."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from sftflow.foundation.errors import SftflowError
from sftflow.foundation.ranks import lost, ranks

NAME = "log.txt"
PACKAGES = ("sftflow", "torch", "transformers")


class LogFile:
    """Lines are kept until the run has a file, which is when it begins to write into its directory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._began = time.localtime()
        self._waiting: list[str] = []

    def open(self, folder: Path, *, anew: bool) -> None:
        """Write into the folder's log from here on, and what was said before. anew: in place of what is there."""
        if self._path is None and ranks().first:
            self._path = folder / NAME
            waiting, self._waiting = self._waiting, []
            with self._path.open("w" if anew else "a", encoding="utf-8", errors="backslashreplace") as file:
                parts = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
                file.write(_stamped(f"---- {', '.join(parts)}; times are {time.strftime('%z')}", self._began))
                file.writelines(waiting)

    def write(self, text: str) -> None:
        """A line, or several; a killed process leaves what it has written."""
        if self._path is None:
            self._waiting.append(_stamped(text))
        else:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(_stamped(text))

    def ended_by(self, error: BaseException) -> None:
        """The one line of an error or a signal, the traceback of a fault of our own."""
        text = f"error: {error}" if isinstance(error, SftflowError) else str(error) or type(error).__name__
        if lost(error):
            text = "error: another process of the run has ended"
        elif isinstance(error, Exception) and not isinstance(error, SftflowError):
            text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # the disk may be what failed; the error itself goes on
            self.write(text)


def _stamped(text: str, when: time.struct_time | None = None) -> str:
    then = time.strftime("%Y-%m-%d %H:%M:%S", when or time.localtime())
    return "".join(f"{then}  {line}".rstrip() + "\n" for line in text.splitlines())


class Heard(logging.Handler):
    """While inside, warnings of our own modules are told to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say, self._logger = say, logging.getLogger("sftflow")

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())

    def __enter__(self) -> None:
        self._logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
