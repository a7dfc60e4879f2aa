"""The command line: the only place that prints or exits. A stage is imported when its command runs."""

from __future__ import annotations

import os
import sys

from sftflow.cli import (  # noqa: F401  each adds its command
    base,
    chat,
    compare,
    demo,
    doctor,
    eval,
    export,
    mix,
    render,
    serve,
    train,
)
from sftflow.cli.common import app
from sftflow.foundation.errors import RunError, SftflowError
from sftflow.foundation.runtime import out_of_memory

ORDER = ("demo", "base", "render", "mix", "train", "eval", "compare", "chat", "serve", "export", "doctor")
app.registered_commands.sort(key=lambda c: ORDER.index(c.name or getattr(c.callback, "__name__", "")))

OUT_OF_MEMORY = RunError(
    "memory", "out of memory", "close other programs, take a smaller model, or for training lower train.micro_tokens"
)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except SftflowError as error:
        if os.environ.get("SFTFLOW_DEBUG"):
            raise
        code = _fail(error)
    except (KeyboardInterrupt, EOFError):
        code = 130
    except BrokenPipeError:
        code = 0
    except MemoryError:
        code = _fail(OUT_OF_MEMORY)
    except OSError as error:
        if os.environ.get("SFTFLOW_DEBUG"):
            raise
        place = str(error.filename or "files")
        fact = error.strerror or str(error)
        code = _fail(RunError(place, fact, "check space and permissions"))
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if not (usage or out_of_memory(error)) or os.environ.get("SFTFLOW_DEBUG"):
            raise
        if usage is None:
            sys.exit(_fail(OUT_OF_MEMORY))
        print(f"error: usage: {' '.join(str(usage()).split())}; see sftflow --help", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)


def _fail(error: SftflowError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
