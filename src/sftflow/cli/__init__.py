"""The command line: the only place that prints or exits. A stage is imported when its command runs."""

from __future__ import annotations

import codecs
import errno
import importlib
import io
import json
import logging
import os
import sys

from sftflow.cli import processes, usage
from sftflow.cli.common import app
from sftflow.foundation.errors import DataError, RunError, SftflowError, said_of, undecoded
from sftflow.foundation.ranks import lost, ranks
from sftflow.foundation.runtime import out_of_memory

ORDER = ("demo", "base", "render", "mix", "data", "train", "eval", "compare", "chat", "serve", "export", "doctor")
for _command in ORDER:
    importlib.import_module(f"sftflow.cli.{_command}")  # each adds its command
app.registered_commands.sort(key=lambda c: ORDER.index(c.name or getattr(c.callback, "__name__", "")))


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    codecs.register_error("escape", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="escape")
    for name in ("torchao", "torch.utils._pytree"):  # where it is installed, transformers imports it, and it logs
        logging.getLogger(name).setLevel(logging.ERROR)  # that its kernels for GPUs cannot be loaded on a CPU
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, EOFError):
        code = 130
    except BrokenPipeError:
        code = 0
    except Exception as error:
        known = _told(error)
        if not processes.tells(error):
            code = known[1] if known else 1
        elif known is None or (os.environ.get("SFTFLOW_DEBUG") and not isinstance(error, MemoryError)):
            raise
        else:
            line, code = known
            print(f"error: {line}", file=sys.stderr)
    processes.leave(code or 0)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What the terminal's encoding has not, as JSON writes it: a document stays one."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _told(error: Exception) -> tuple[str, int] | None:
    """(what is said of it, the exit code); None for a fault of the program's own."""
    if hasattr(error, "format_message"):
        return usage.told(error), getattr(error, "exit_code", 2)
    locale = sys.getfilesystemencoding()
    if isinstance(error, UnicodeEncodeError) and (
        error.reason == "surrogates not allowed" or error.encoding == locale != "utf-8"
    ):  # in bytes that were typed, or in a file's name
        error = DataError(ascii(error.object), *undecoded())
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        error = DataError(f"{str(error.filename)[:60]} ...", str(error.strerror), "check the path")
    elif isinstance(error, OSError):
        error = RunError(str(error.filename or "files"), *said_of(error))
    elif isinstance(error, ModuleNotFoundError) and (error.name or "sftflow").partition(".")[0] != "sftflow":
        package = str(error.name).partition(".")[0]
        error = SftflowError(package, "this Python package is not installed", f"pip install {package}")
    elif lost(error):
        remedy = f"look at what ended it; {processes.goes_on}"
        error = RunError(f"rank {ranks().rank}", "another process of the run has ended", remedy)
    elif isinstance(error, MemoryError) or out_of_memory(error):
        remedy = "close other programs, take a smaller model, or for training lower train.micro_tokens"
        error = RunError("memory", "out of memory", remedy)
    return (str(error), error.exit_code) if isinstance(error, SftflowError) else None
