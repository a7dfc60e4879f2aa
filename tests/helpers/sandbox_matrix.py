"""Run programs in the `process` sandbox beside a HOME, a server and this process, and tell what each of them did.

Standard input: JSON {name: program}; output, a line a program: JSON [name, how, last line, [what it disturbed], walls].
Started by any user, who owns HOME (the one argument) from then on; as root it shows what root's programs meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from sftflow.sandbox import run_python

KEY = "a-key-that-nobody-is-to-see"
AROUND = ("/dev/shm", "/dev/mqueue")


def furnish(home: Path) -> socket.socket:
    """HOME made anew; the Unix socket in it."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "sub").mkdir(parents=True)
    (home / "notes.txt").write_text("notes\n")
    (home / "notes.py").write_text(f"print({KEY!r})\n")
    (home / "key.txt").write_text(f"{KEY}\n")
    with contextlib.suppress(OSError):  # a file system without them
        os.setxattr(home / "notes.txt", "user.key", KEY.encode())
    os.utime(home / "notes.txt", (10**9, 10**9))
    listens = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listens.bind(str(home / "socket"))
    listens.setblocking(False)
    return listens


def state(home: Path) -> dict[str, Any]:
    """Everything about the folder, and about this process, that a program could have changed."""
    found: dict[str, Any] = {}
    for path in [home, *sorted(home.rglob("*"))] if home.exists() else []:
        about = path.lstat()
        kept = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (about.st_mode, about.st_nlink, about.st_uid, about.st_mtime_ns, kept, *os.listxattr(path))
    for folder in AROUND:
        found[folder] = sorted(
            name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if "sftflow" in name
        )
    found["process"] = (
        os.getpriority(os.PRIO_PROCESS, 0),
        *os.sched_getaffinity(0),
        os.sched_getscheduler(0),
        resource.getrlimit(resource.RLIMIT_NOFILE),
        Path("/proc/self/comm").read_text(),
        Path("/proc/self/oom_score_adj").read_text(),
    )
    return found


def main() -> None:
    home = Path(sys.argv[1])
    signals: list[int] = []
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}:
        signal.signal(number, lambda got, _: signals.append(got))
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", port))
    abstract, own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), furnish(home)
    abstract.bind(f"\0sftflow-{port}")
    for server in (tcp, udp, abstract):
        server.setblocking(False)
    before = f"HOME, PARENT, PORT = {str(home)!r}, {os.getpid()}, {port}\n"
    for name, program in json.load(sys.stdin).items():
        was = state(home)
        done = run_python(before + program, seconds=5, isolation="process")
        disturbed = [f"signal {number}" for number in signals]
        disturbed += ["the key was told"] if KEY in done.output else []
        after = state(home)
        disturbed += [key for key in {**was, **after} if was.get(key) != after.get(key)]
        for server in (tcp, udp, abstract, own):
            try:
                server.accept() if server is tcp else server.recv(10)
                disturbed.append("the network")
            except BlockingIOError:
                pass
        signals.clear()
        if disturbed:
            own.close()
            own = furnish(home)
            for folder in AROUND:
                for left in after[folder]:
                    os.remove(os.path.join(folder, left))
        said = (done.output.strip().splitlines() or [""])[-1]
        print(json.dumps([name, done.how, said, disturbed, getattr(done, "walls", ())]), flush=True)


if __name__ == "__main__":
    main()
