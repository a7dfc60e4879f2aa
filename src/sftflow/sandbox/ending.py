"""The end of a program for certain: no process of it is left, and no file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from sftflow.foundation.errors import RunError

KILL_ROUNDS = 500


def kill_all(process: subprocess.Popen[bytes], variable: str) -> None:
    """End the process, its group, and whatever left that group: descendants keep the environment they began with."""
    for _ in range(KILL_ROUNDS):
        if process.returncode is None:  # not yet reaped: its number cannot be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        left = carrying(variable)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            process.wait()
            return
        time.sleep(0.01)
    raise RunError("sandbox", f"processes {left[:5]} cannot be ended", "end them by hand")


def carrying(variable: str) -> list[int]:
    """Live processes that began with "NAME=value" in their environment; [] where /proc does not say."""
    wanted, found = variable.encode(), []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as f:
                if wanted in f.read().split(b"\0"):
                    found.append(int(name))
    return found


def remove(folder: Path) -> None:
    """Remove a folder whose owner may have taken all rights from it and its parts, or nested them without end."""
    with contextlib.suppress(OSError):  # it may be gone
        os.chmod(folder, 0o700)
        found = [str(folder)]
        for place in found:
            for name in os.listdir(place):
                path = os.path.join(place, name)
                if os.path.isdir(path) and not os.path.islink(path):  # chmod would follow it out of the folder
                    os.chmod(path, 0o700)
                    found.append(os.path.join(folder, secrets.token_hex(16)))
                    os.rename(path, found[-1])  # else paths are longer than may be, and rmtree recurses too deep
    shutil.rmtree(folder, ignore_errors=True)
