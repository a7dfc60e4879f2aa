"""A guard against accidents, inside the program's process: an audit hook that refuses what no graded program needs.

It runs before the operating system is asked, so that a program gets a `Refused` and may go on. It is no wall: code
that sets out to get around a hook of its own process will. The walls are around it: namespaces, users, `walls`, limits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Raised by CPython itself under these names: docs.python.org/3/library/audit_events.html
EVENTS = {
    "a process": ("os.fork", "os.forkpty", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "subprocess.Popen"),
    "another program": ("os.startfile", "pty.spawn", "webbrowser.open"),
    "native code": ("ctypes.",),
    "the network": ("socket.", "syslog."),
    "changing limits": ("resource.setrlimit", "resource.prlimit"),
    "a signal to others": ("os.kill", "os.killpg", "signal.pthread_kill"),
    "a device": ("fcntl.ioctl",),
    "another interpreter": ("cpython.PyInterpreterState_New", "sys.remote_exec"),  # no hook of ours is there
    "native code for a database": ("sqlite3.enable_load_extension", "sqlite3.load_extension"),
}
# What Python raises no event for, by the modules that bear the name: the call itself is replaced.
CALLS = {
    "a pipe or node": ("posix os", "mkfifo mknod"),
    "a process": ("_posixsubprocess", "fork_exec"),
    "a signal to others": ("posix os _signal signal", "pidfd_open pidfd_send_signal"),
    "changing others": ("posix os", "setpriority sched_setaffinity sched_setparam sched_setscheduler tcsetpgrp"),
    "a terminal": ("posix os", "openpty login_tty posix_openpt"),
    "another system": ("posix os", "chroot setns unshare"),
    "a file outside the temporary folder": ("sys _locale", "activate_stack_trampoline bindtextdomain"),
}
# Modules whose C code opens files, devices or other interpreters with no event. Not a list of the few that may be
# imported: a later Python's own new module must not turn right answers wrong. Any other native module comes from the
# system's folders, never from the program's.
MODULES = """
_ctypes _ctypes_test _curses _curses_panel _dbm _gdbm _interpchannels _interpqueues _interpreters _posixshmem
_remote_debugging _testcapi _testinternalcapi _tkinter _xxinterpchannels _xxsubinterpreters nis ossaudiodev readline
spwd termios
"""
FCNTL = (*range(8), 36, 37, 38, *range(1030, 1035))  # Linux's numbers for copies, flags, locks, pipe sizes and seals
ATTACH, PRAGMA = 24, 19  # sqlite3.h
READING = ("os.listdir", "os.scandir", "os.chdir", "os.getxattr", "os.listxattr")
# event -> which arguments are paths, and which hold the folders they are relative to
WRITING = {
    "os.chflags": ((0,), ()),
    "os.chmod": ((0,), (2,)),
    "os.chown": ((0,), (3,)),
    "os.lchown": ((0,), ()),
    "os.link": ((0, 1), (2, 3)),
    "os.mkdir": ((0,), (2,)),
    "os.remove": ((0,), (1,)),
    "os.removexattr": ((0,), ()),
    "os.rename": ((0, 1), (2, 3)),
    "os.rmdir": ((0,), (1,)),
    "os.setxattr": ((0,), ()),
    "os.symlink": ((1,), (2,)),
    "os.truncate": ((0,), ()),
    "os.utime": ((0,), (3,)),
    "sqlite3.connect": ((0,), ()),
}
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")


class Refused(PermissionError):
    """What a program gets where the guard says no."""

    __module__ = "builtins"  # its name alone is shown


class RefusedModule(ImportError):
    """The same for a module: what tries to import it and can do without goes on."""

    __module__ = "builtins"


def install(folder: str, readable: Iterable[str]) -> None:
    """From here on, for good: write in `folder` alone, read there and below `readable`, the system's and Python's."""
    # Names of this frame, not of modules: a program that replaces os.path.realpath does not change the guard by it. One
    # that replaces what realpath itself calls does; then the walls are left.
    realpath, join, fspath, fsdecode = os.path.realpath, os.path.join, os.fspath, os.fsdecode
    here, self_id, unix, linux = realpath(folder), os.getpid(), 1, sys.platform == "linux"
    refused, no_module, writing, reading, devices = Refused, RefusedModule, WRITING, READING, DEVICES
    modules, commands, attach, pragma = frozenset(MODULES.split()), FCNTL, ATTACH, PRAGMA
    forbidden = {event: what for what, events in EVENTS.items() for event in events}
    system = tuple(realpath(path) for path in readable)
    roots, loading = (here, *system), list[str]()
    mask, changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, frozenset("wax+")

    def whole(path: Any, parent: Any = -1) -> str:
        text = fsdecode(fspath(path))
        return realpath(join(f"/proc/self/fd/{parent}", text) if isinstance(parent, int) and parent >= 0 else text)

    def under(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == f or path.startswith(f + "/") for f in folders)

    def may_write(path: Any, parent: Any = -1) -> None:
        if path is None or isinstance(path, int) or path in (":memory:", b":memory:", ""):
            return
        place = whole(path, parent)
        if not under(place, (here,)) and place not in devices:
            raise refused(f"writing outside the temporary folder: {place}")

    def may_read(path: Any, parent: Any = -1) -> None:
        if path is None or isinstance(path, int):
            return
        place = whole(path, parent)
        if not under(place, roots) and place not in devices:
            raise refused(f"reading outside the temporary folder: {place}")

    def may_import(name: str, file: Any) -> None:
        if name in modules or (file is not None and not under(whole(file), system)):
            raise no_module(f"{name} is not for a sandboxed program", name=name)

    def database_file(name: Any) -> str:
        """The file of a database, which may be named by a URI: file:/a/b?mode=ro -> /a/b."""
        text = fsdecode(fspath(name))
        if not text.startswith("file:"):
            return text
        path = text[5:].partition("?")[0].partition("#")[0]
        if "%" in path:
            raise refused(f"a database's name with percent signs ({text}) is not for a sandboxed program")
        return path if not path.startswith("//") else "/" + path[2:].partition("/")[2]

    def authorize(action: int, first: str | None, *_: Any) -> int:
        """A database attaches no other: its file may be named by a URI, a value or an expression."""
        attaches = action == attach and first not in ("", ":memory:")
        return int(attaches or (action == pragma and first == "temp_store_directory"))

    def judge(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args  # C code that opens by fopen tells its mode, and flags of 0
            if (isinstance(flags, int) and flags & mask) or (isinstance(mode, str) and not changing.isdisjoint(mode)):
                may_write(path)
            else:
                may_read(path)
        elif event in writing:
            paths, parents = writing[event]
            for k, n in enumerate(paths):
                if n < len(args):
                    path = database_file(args[n]) if event == "sqlite3.connect" else args[n]
                    if linux and isinstance(path, int):
                        path = f"/proc/self/fd/{path}"
                    may_write(path, args[parents[k]] if k < len(parents) and parents[k] < len(args) else -1)
        elif event in reading:
            may_read(args[0] if args and args[0] is not None else ".")
        elif event == "import":
            may_import(args[0], args[1])
            if args[0] == "_sqlite3" and not loading:
                loading.append(args[0])
                replace_connection(importlib.import_module("_sqlite3"), authorize)
        elif event == "fcntl.fcntl":
            if linux and args[1] not in commands:
                raise refused(f"a descriptor's owner or lease ({event}) is not for a sandboxed program")
        else:
            what = forbidden.get(event) or forbidden.get(event.partition(".")[0] + ".")
            if what is None or event == "socket.gethostname":
                return
            # asyncio's loop wakes itself through a pair of Unix sockets; connecting one stays refused.
            if (event == "socket.__new__" and args[1] == unix) or (event == "os.kill" and args[0] == self_id):
                return
            raise refused(f"{what} ({event}) is not for a sandboxed program")

    replace_calls()
    replace_opening(lambda path, flags, parent: (may_write if flags & mask else may_read)(path, parent))
    sys.addaudithook(judge)


def replace_calls() -> None:
    """The calls that raise no event refuse, or do without what is outside."""
    for what, (modules, names) in CALLS.items():
        for module in modules.split():
            try:
                place = importlib.import_module(module)
            except ImportError:  # this Python lacks it
                continue
            for name in names.split():
                if hasattr(place, name):
                    setattr(place, name, refusing(f"{what} ({module}.{name}) is not for a sandboxed program"))
    with contextlib.suppress(ImportError):
        setattr(importlib.import_module("_multiprocessing"), "SemLock", ThreadLock)  # noqa: B010


def refusing(reason: str, refused: type[Refused] = Refused) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise refused(reason)

    return refuse


class ThreadLock:
    """multiprocessing's semaphore for the threads of one process (its ThreadPool and Queue take it): the C library's is
    a file in /dev/shm."""

    SEM_VALUE_MAX = (1 << 31) - 1
    handle, name = 0, None

    def __init__(self, kind: int, value: int, maxvalue: int, *_: Any) -> None:
        import threading

        self.kind, self.maxvalue = kind, maxvalue
        self.recursive = kind == 0
        self.free, self.me = threading.Semaphore(value), threading.get_ident
        self.owner, self.count = 0, 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if not (self.recursive and self._is_mine()) and not self.free.acquire(block, timeout if block else None):
            return False
        self.owner, self.count = self.me(), self.count + 1
        return True

    def release(self, *_: Any) -> None:
        if self.recursive and not self._is_mine():
            raise AssertionError("attempt to release recursive lock not owned by thread")
        if not self.recursive and self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self.count -= 1
        if not (self.recursive and self.count):
            self.free.release()

    __enter__, __exit__ = acquire, release

    def _count(self) -> int:
        return self.count

    def _is_mine(self) -> bool:
        return self.count > 0 and self.owner == self.me()

    def _get_value(self) -> int:
        return self.free._value

    def _is_zero(self) -> bool:
        return self._get_value() == 0


def replace_opening(check: Callable[[Any, int, int], None]) -> None:
    """os.open raises an event that does not tell of the folder a path is relative to."""
    call = os.open

    def open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            check(path, flags, dir_fd)
        return call(path, flags, mode, dir_fd=dir_fd)

    os.open = open
    os.supports_dir_fd.add(open)


def replace_connection(module: Any, authorize: Callable[..., int]) -> None:
    """Every connection that sqlite3 makes asks `authorize`: SQL opens files without an event."""

    class Connection(module.Connection):  # type: ignore[misc]
        __module__, __doc__ = "sqlite3", module.Connection.__doc__

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            super().set_authorizer(authorize)

    def connect(*args: Any, **options: Any) -> Any:
        return options.get("factory", args[5] if len(args) > 5 else Connection)(*args, **options)

    module.Connection, module.connect = Connection, connect
