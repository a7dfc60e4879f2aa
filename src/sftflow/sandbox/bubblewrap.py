"""The strong way: bubblewrap (`bwrap`) shows the program a system of its own, with nothing of the user's in it.

Its flags: https://man.archlinux.org/man/bwrap.1
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = "/tmp"
FOLDER_BYTES = 64 << 20
PROBE_SECONDS = 20
# What a Python needs of the system to start, and no more of /etc than its linker and clock read.
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/gnu/store")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/alternatives")


def python() -> str:
    """The interpreter itself, not a virtual environment's link to it: its packages stay outside."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def python_folders() -> list[str]:
    """What Python needs to start and lies outside the system's folders: its prefix, library and executable."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    kept: list[str] = []
    for path in (os.path.realpath(sys.base_prefix), library, python()):
        inside = any(path == k or path.startswith(k + "/") for k in (*SYSTEM, *kept))
        if not inside and path.count("/") > 1:  # a prefix of "/" or "/home" would show everything
            kept.append(path)
    return kept


def readable() -> list[str]:
    """What a program may read besides its own folder, in either way; much of it is not there on every system."""
    return [*SYSTEM, *SYSTEM_FILES, "/System/Library", *python_folders()]


def bwrap(command: list[str]) -> list[str]:
    """command -> the same in a sandbox: no network, no processes but its own, a read-only system, an empty /tmp."""
    root = os.geteuid() == 0
    # Root stays in its user namespace, so that the program can become another user there: limits on the number of
    # processes never bind root, by whatever name.
    out = [str(shutil.which("bwrap"))]
    if root:
        out += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        out += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        out += ["--unshare-all"]
    out += ["--die-with-parent", "--new-session", "--proc", "/proc", "--dev", "/dev"]
    out += ["--perms", "0755", "--dir", "/etc"]
    for path in (*SYSTEM, *SYSTEM_FILES):
        out += ["--ro-bind-try", path, path]
    for path in python_folders():
        for parent in reversed(Path(path).parents[:-1]):  # bwrap would make them for root's eyes alone
            out += ["--perms", "0755", "--dir", str(parent)]
        out += ["--ro-bind", path, path]
    out += ["--size", str(FOLDER_BYTES), "--perms", "1777", "--tmpfs", FOLDER, "--remount-ro", "/"]
    return [*out, "--chdir", FOLDER, "--", *command]


@functools.cache
def why_no_bubblewrap() -> str:
    """ "" where bubblewrap works on this machine, else the reason. Tried once: a container may forbid what it needs."""
    if not sys.platform.startswith("linux"):
        return "bubblewrap is for Linux"
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        done = subprocess.run(
            bwrap([python(), "-P", "-s", "-S", "-B", "-c", "pass"]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={},
            timeout=PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap does not start: {' '.join(str(error).split())[:200]}"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"bwrap does not work here: {said[-1][:200]}"
    return ""
