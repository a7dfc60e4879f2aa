"""Run a Python program nobody has read: limited, cut off from the network and the user's files, ended for certain."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import marshal
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sftflow.foundation.errors import RunError, said_of
from sftflow.foundation.ranks import cores
from sftflow.sandbox.bubblewrap import FOLDER, bwrap, python, readable, why_no_bubblewrap
from sftflow.sandbox.ending import kill_all, remove

Isolation = Literal["auto", "bubblewrap", "process"]
KEPT_BYTES = 2048  # of the output's beginning, and as much of its end
MOST_BYTES = 16 << 20  # a program that prints more is stopped
START_SECONDS = 60  # for the interpreter to be ready: on a loaded machine a program's own time begins after that
POLL_SECONDS = 0.02  # where the kernel cannot wake us at a process's end
FIRST_USER = 1 << 30  # user ids no system hands out
READY = b"ready"
TAG = "SFTFLOW_SANDBOX"
_slots = threading.BoundedSemaphore(cores())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended.

    how: "passed" (its last line was reached), "failed" (an exception), "exited" (it left earlier), "refused" (by the
    guard), "timeout", "memory", "output" (it printed without end), "killed" (by a signal).
    output: the beginning and end of what it printed, errors included.   isolation: "bubblewrap" or "process".
    walls: what stood around it besides limits and guard, of "namespaces", "user" (another, root's programs alone),
        "landlock-N" (N: the kernel's ABI) and "seccomp"; docs/sandbox.md says what each holds.
    """

    ok: bool
    how: str
    output: str
    seconds: float
    isolation: str
    walls: tuple[str, ...] = ()


def isolation_available() -> tuple[str, ...]:
    """The ways that work on this machine, the stronger first; () on Windows."""
    if sys.platform == "win32":
        return ()
    return ("process",) if why_no_bubblewrap() else ("bubblewrap", "process")


def run_python(program: str, *, seconds: float = 10, memory_mib: int = 1024, isolation: Isolation = "auto") -> Outcome:
    """Run a program to its end or to its limits, and leave nothing behind: no process, no file.

    >>> run_python("print(6 * 7)").output
    '42\\n'

    May be called from many threads; as many programs run at once as there are cores.
    """
    with _slots:
        return _run(program, seconds, memory_mib, _choose(isolation))


def _choose(isolation: Isolation) -> str:
    if sys.platform == "win32":
        raise RunError("sandbox", "model-written code is not run on Windows", "use WSL or a container")
    if isolation == "auto":
        return isolation_available()[0]
    if isolation == "bubblewrap" and (reason := why_no_bubblewrap()):
        raise RunError("sandbox", reason, "install bubblewrap where user namespaces are allowed, or ask for process")
    return isolation


def _run(program: str, seconds: float, memory_mib: int, isolation: str) -> Outcome:
    token, tag = secrets.token_hex(16), secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="sftflow-"))
        stack.callback(remove, folder)
        source = stack.enter_context(tempfile.TemporaryFile())
        source.write(token.encode() + program.encode("utf-8", "surrogatepass"))
        source.flush()
        source.seek(0)
        receiver, sender = os.pipe()
        stack.callback(os.close, receiver)
        try:
            process = subprocess.Popen(
                _command(isolation, sender, seconds, memory_mib),
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(isolation, folder, tag),
                pass_fds=(sender,),
                start_new_session=True,
            )
        except OSError as error:
            remedy = "end others, or free memory" if error.errno in (errno.EAGAIN, errno.ENOMEM) else said_of(error)[1]
            raise RunError("sandbox", f"cannot start a process ({error})", remedy) from None
        finally:
            os.close(sender)
        running = _RunningProgram(process, receiver, seconds)
        try:
            stopped = running.wait()
            taken = time.monotonic() - running.started
        finally:
            kill_all(process, f"{TAG}={tag}")
        running.drain()
    if not running.ready:  # not the program's fault, so no verdict on it
        said = running.output.strip().splitlines() or [stopped or f"exit status {process.returncode}"]
        raise RunError("sandbox", f"the interpreter did not start ({said[-1]})", f"check that {python()} runs")
    how = stopped or _verdict(running.report, token, process.returncode)
    return Outcome(
        ok=how == "passed",
        how=how,
        output=running.output,
        seconds=round(taken, 3),
        isolation=isolation,
        walls=running.walls,
    )


@functools.cache
def first_code() -> str:
    """guard, walls and inside, compiled: the sandboxed interpreter is of this one's version, and starts sooner."""
    out = "import marshal, types\n"
    for name in ("guard", "walls", "inside"):
        text = Path(__file__).with_name(f"{name}.py").read_text("utf-8")
        code = marshal.dumps(compile(text, f"<{name}>", "exec", dont_inherit=True, optimize=2)).hex()
        if name == "inside":
            out += "names = {'__name__': '__main__', '__package__': '', 'guard': guard, 'walls': walls}\n"
        else:
            out += f"{name} = types.ModuleType('{name}')\nnames = {name}.__dict__\n"
        out += f"exec(marshal.loads(bytes.fromhex('{code}')), names)\n"
    return out


def _command(isolation: str, report: int, seconds: float, memory_mib: int) -> list[str]:
    """The interpreter with our first code on its command line, in bubblewrap where that is the way."""
    user = FIRST_USER + secrets.randbelow(1 << 29)
    # No -I: it would ignore PYTHONHASHSEED, and a verdict must not hang on the order of a set. The environment holds
    # no other variable of Python's, -P keeps the folder off the path, -s and -S the packages.
    out = [python(), "-P", "-s", "-S", "-B", "-X", "utf8", "-c", first_code()]
    out += [str(report), str(math.ceil(seconds) + 1), str(memory_mib), str(user)]
    return bwrap([*out, "", *readable()]) if isolation == "bubblewrap" else [*out, "namespaces", *readable()]


def _environment(isolation: str, folder: Path, tag: str) -> dict[str, str]:
    home = FOLDER if isolation == "bubblewrap" else str(folder)
    fixed = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": home, "TMPDIR": home}
    return {**fixed, "USER": "nobody", TAG: tag}  # getpass has its name from there: the list of users is not readable


def _verdict(report: bytes, token: str, code: int | None) -> str:
    """What the program's process said of its end, believed only where it can be."""
    try:
        said = json.loads(report.partition(b"\n")[2])
        how = said["how"]
        if how == "passed":
            return "passed" if secrets.compare_digest(str(said["token"]).encode(), token.encode()) else "failed"
        return how if how in ("failed", "exited", "refused", "memory") else "failed"
    except (ValueError, KeyError, TypeError):
        pass
    number = -(code or 0) if (code or 0) < 0 else (code or 0) - 128
    if number == signal.SIGXCPU:
        return "timeout"
    return "killed" if number > 0 else "exited"


@dataclass
class _RunningProgram:
    """Reads what the program prints and reports until its process ends or its time is over.

    receiver: the end of the report's pipe that is read.   seconds: that the program may take, once it is ready.
    """

    process: subprocess.Popen[bytes]
    receiver: int
    seconds: float
    ready: bool = False
    walls: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)
    report: bytes = b""
    total: int = 0
    _head: bytearray = field(default_factory=bytearray)
    _tail: bytearray = field(default_factory=bytearray)

    def wait(self) -> str:
        """Why the program must be stopped: "timeout", "output", or "" where it ended by itself."""
        assert self.process.stdout is not None
        printed = self.process.stdout.fileno()
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(printed, selectors.EVENT_READ)
            os.set_blocking(printed, False)
            os.set_blocking(self.receiver, False)
            step = POLL_SECONDS
            with contextlib.suppress(OSError, AttributeError):  # not Linux, or an old one
                end = os.pidfd_open(self.process.pid)
                stack.callback(os.close, end)
                selector.register(end, selectors.EVENT_READ)
                step = 1.0
            selector.register(self.receiver, selectors.EVENT_READ)
            while True:
                most = self.seconds if self.ready else START_SECONDS
                left = self.started + most - time.monotonic()
                if left <= 0:
                    return "timeout"
                for key, _ in selector.select(min(step, left)):
                    if key.fd == printed and not self._read_output(printed):
                        selector.unregister(printed)  # it closed its output; it may go on
                    if key.fd == self.receiver and not self._read_report():
                        selector.unregister(self.receiver)
                if self.total > MOST_BYTES:
                    return "output"
                if self.process.poll() is not None:
                    return ""

    def drain(self) -> None:
        """Read what is still in the pipes. No process is left to write, so they hold little, and nothing more comes."""
        assert self.process.stdout is not None
        printed = self.process.stdout.fileno()
        while self.total <= 2 * MOST_BYTES and self._read_output(printed):
            pass
        while self._read_report():
            pass
        self.process.stdout.close()

    def _read_report(self) -> bool:
        """A line as the program begins, another as it ends."""
        try:
            block = os.read(self.receiver, 4096)
        except BlockingIOError:
            return False
        self.report += block
        first, end, _ = self.report.partition(b"\n")
        if not self.ready and end and first.startswith(READY):
            self.ready, self.started = True, time.monotonic()
            self.walls = tuple(first.decode("ascii", "replace").split()[1:])
        return bool(block) and len(self.report) <= 1 << 16

    def _read_output(self, printed: int) -> bool:
        try:
            block = os.read(printed, 1 << 16)
        except BlockingIOError:
            return self.process.returncode is None
        self.total += len(block)
        room = KEPT_BYTES - len(self._head)
        self._head += block[:room]
        self._tail = (self._tail + block[room:])[-KEPT_BYTES:]
        return bool(block)

    @property
    def output(self) -> str:
        left_out = self.total - len(self._head) - len(self._tail)
        gap = f"\n... {left_out} bytes left out ...\n".encode() if left_out else b""
        return (bytes(self._head) + gap + bytes(self._tail)).decode("utf-8", "replace")
