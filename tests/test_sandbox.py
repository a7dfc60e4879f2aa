"""What a program nobody has read can do to this machine: nothing, in either way of running it."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sftflow
from helpers.payloads import DISARM
from sftflow.foundation.errors import RunError
from sftflow.sandbox import Isolation, Outcome, bubblewrap, isolation_available, run_python, why_no_bubblewrap
from sftflow.sandbox import execute as run

SOURCE = Path(sftflow.__file__).parent.parent
REFUSING = Path(__file__).parent / "helpers" / "refusing.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is run on Windows")

# Where there is no bubblewrap, the tests that are about it alone skip and say why.
needs_bubblewrap = pytest.mark.skipif(bool(why_no_bubblewrap()), reason=f"bubblewrap: {why_no_bubblewrap()}")


@pytest.fixture(params=["process"] if why_no_bubblewrap() else ["process", "bubblewrap"])
def way(request: pytest.FixtureRequest) -> Isolation:
    return request.param


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test ends with no process of its own alive and no folder left; yields the name all processes carry."""
    name, folder = f"SANDBOX_{uuid.uuid4().hex}", tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(run, "TAG", name)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield name
    assert carrying(name) == []
    assert list(folder.iterdir()) == []


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without seccomp and Landlock: there a program past the guard can fork, and other walls must hold it."""
    command = run._command
    without = [bubblewrap.python(), "-S", str(REFUSING), "landlock,seccomp"]
    monkeypatch.setattr(run, "_command", lambda *given: [*without, *command(*given)])


def carrying(name: str) -> list[str]:
    """Command lines of live processes that began with a variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}=".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text(errors="replace")[-200:])
        except OSError:
            continue
    return found


def do(program: str, way: Isolation, seconds: float = 5) -> Outcome:
    outcome = run_python(textwrap.dedent(program), seconds=seconds, memory_mib=256, isolation=way)
    assert outcome.isolation == way
    assert outcome.ok == (outcome.how == "passed")
    return outcome


def last(outcome: Outcome) -> str:
    return outcome.output.strip().splitlines()[-1]


# ---- verdicts


def test_a_program_passes_where_its_last_line_was_reached(way: Isolation) -> None:
    done = do("print(6 * 7)", way)
    assert (done.how, done.output) == ("passed", "42\n")


@pytest.mark.parametrize(
    "program, how, said",
    [
        ("print('a')\n1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("x\0", "failed", "SyntaxError: source code string cannot contain null bytes"),
        ("x = '\udc80'", "failed", "surrogates not allowed"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("import numpy", "failed", "ModuleNotFoundError: No module named 'numpy'"),
        ("import sys; sys.exit(0)", "exited", "SystemExit: 0"),
        ("import os; os._exit(0)", "exited", ""),
        ("import os; os.kill(os.getpid(), 9)", "killed", ""),
        ("x = bytearray(10 << 30)", "memory", "MemoryError"),
        ("x = []\nwhile True: x.append(' ' * 10_000_000)", "memory", "MemoryError"),
        ("while True: pass", "timeout", ""),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(99)", "timeout", ""),
        ("class E(Exception):\n    def __str__(self): return 1\nraise E", "failed", "E: <exception str() failed>"),
    ],
)
def test_verdicts(program: str, how: str, said: str, way: Isolation) -> None:
    began = time.monotonic()
    done = do(program, way, seconds=1 if how == "timeout" else 10)
    assert (done.how, said in done.output) == (how, True), done.output
    if how == "timeout":
        assert 1 <= done.seconds < 2 and time.monotonic() - began < 10


@pytest.mark.parametrize(
    "program",
    [
        # Every descriptor gets a report, with and without leaving afterwards.
        """
        import os
        for fd in range(1, 60):
            try: os.write(fd, b'{"how": "passed", "token": "00000000000000000000000000000000"}')
            except OSError: pass
        os._exit(0)
        """,
        """
        import os, json, sys
        json.dumps = lambda *a: '{"how": "passed", "token": ""}'
        os.write = os.pread = lambda *a: b"passed"
        os._exit = sys.exit = print
        1 / 0
        """,
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\nimport time; time.sleep(5)",
    ],
)
def test_a_verdict_cannot_be_had_by_leaving_early(program: str, way: Isolation) -> None:
    assert do(program, way).how in ("failed", "exited")


def test_output_is_cut(way: Isolation) -> None:
    done = do("print('begin'); print('x' * 100_000); print('end')", way)
    assert done.ok and len(done.output) < 5000
    assert done.output.startswith("begin\nxxx") and done.output.endswith("xxx\nend\n")
    assert f"... {100_000 + 11 - 4096} bytes left out ..." in done.output


def test_endless_output_is_stopped(way: Isolation) -> None:
    done = do("while True: print('x' * 1000)", way)
    assert done.how == "output" and len(done.output) < 5000


def test_a_verdict_does_not_hang_on_the_order_of_a_set(way: Isolation) -> None:
    assert len({do("print(set('abcdefgh'))", way).output for _ in range(3)}) == 1


def test_what_ordinary_programs_use_works(way: Isolation) -> None:
    done = do(
        """
        import asyncio, collections, dataclasses, decimal, fractions, hashlib, heapq, json, math, multiprocessing, os
        import random, re, socket, sqlite3, string, subprocess, tempfile, threading, typing, unittest, zoneinfo
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(folder + "/a/b")
            open(folder + "/x", "w").write("hi")
            os.rename(folder + "/x", folder + "/a/y")
        async def f(): return 3
        assert asyncio.run(f()) == 3
        sqlite3.connect(":memory:").execute("select 1")
        with sqlite3.connect("file:kept.db?mode=rwc", uri=True) as kept:
            kept.execute("create table t (a)"); kept.execute("insert into t values (1)")
        kept.execute("vacuum"); kept.close()
        thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
        @dataclasses.dataclass
        class Point:
            x: int = 0
        print(Point(), __name__)
        """,
        way,
    )
    assert done.output == "thread\nPoint(x=0) __main__\n"
    assert done.ok


def test_what_programs_rarely_use_works(way: Isolation) -> None:
    """What the walls and the guard come near: descriptors, modes and times, modules that can do without others."""
    program = textwrap.dedent(
        """
        import concurrent.futures, doctest, fcntl, getpass, mmap, multiprocessing.pool, os, pathlib, pdb
        import shelve, shutil, socket, uuid
        with shelve.open("shelf") as shelf:
            shelf["a"] = 1
        pathlib.Path("x").write_text("hello")
        shutil.copy2("x", "y"); shutil.copytree(".", "z", ignore=lambda *a: ["z"])
        os.chmod("y", 0o600); os.truncate("y", 2); os.utime("y", (5, 5)); pathlib.Path("x").touch()
        about = os.stat("y")
        assert (about.st_mode & 0o777, about.st_mtime, about.st_size) == (0o600, 5, 2)
        os.chmod("y", 0o640, dir_fd=os.open(".", os.O_RDONLY))
        shutil.rmtree("z")
        with open("x", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX); os.chmod(file.fileno(), 0o600); os.ftruncate(file.fileno(), 3)
            assert mmap.mmap(file.fileno(), 0)[:] == b"hel"
        one, other = socket.socketpair(); one.setblocking(False); one.send(b"x"); assert other.recv(1) == b"x"
        assert multiprocessing.pool.ThreadPool(2).map(abs, [-1, -2]) == [1, 2]
        lock, queue = multiprocessing.RLock(), multiprocessing.Queue()
        with lock, lock: queue.put(3)
        assert queue.get(timeout=2) == 3 and multiprocessing.Lock().acquire(timeout=1)
        assert list(concurrent.futures.ThreadPoolExecutor(2).map(abs, [-1])) == [1]
        def f():
            ">>> f()\\n3\\n"
            return 3
        assert doctest.testmod() == (0, 1)
        getpass.getuser(), os.sched_getaffinity(0), os.isatty(0), uuid.uuid4(), os.set_inheritable(one.fileno(), True)
        """
    )
    done = run_python(program, isolation=way)  # threads take the address space that programs have
    assert done.ok, done.output


# ---- the guard


@pytest.mark.parametrize(
    "program, said",
    [
        ("import socket; socket.socket()", "the network (socket.__new__)"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "the network (socket.getaddrinfo)"),
        ("import subprocess; subprocess.run(['true'])", "a process (subprocess.Popen)"),
        ("import os; os.system('true')", "a process (os.system)"),
        ("import os; os.execv('/bin/true', ['true'])", "a process (os.exec)"),
        ("import os\nwhile True: os.fork()", "a process (os.fork)"),
        ("import multiprocessing as m; m.Process(target=print).start()", "a process"),
        ("import ctypes", "_ctypes is not for a sandboxed program"),
        ("import readline", "readline is not for a sandboxed program"),
        ("import os; os.mkfifo('x')", "a pipe or node (os.mkfifo)"),
        ("import os; f = os.open('.', 0); os.chmod('/usr', 0o777, dir_fd=f)", "writing outside"),
        ("import sqlite3; sqlite3.connect('file:///usr/x?mode=ro', uri=True)", "writing outside"),
        ("import os; os.kill(os.getppid(), 9)", "a signal to others (os.kill)"),
        ("import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))", "changing limits"),
        ("open('/usr/x', 'w')", "writing outside the temporary folder: /usr/x"),
        ("import os; os.open('/usr/x', os.O_CREAT)", "writing outside the temporary folder: /usr/x"),
        ("import os; os.symlink('/usr', 'u'); open('u/x', 'w')", "writing outside the temporary folder: /usr/x"),
        ("import ssl; ssl.create_default_context().keylog_filename = '/usr/x'", "writing outside the temporary folder"),
        ("import os; os.remove('/usr/x')", "writing outside the temporary folder: /usr/x"),
        ("import os; f = os.open('/usr', 0); os.mkdir('x', dir_fd=f)", "writing outside the temporary folder: /usr/x"),
        ("import os; os.rename('/usr/x', 'y')", "writing outside the temporary folder: /usr/x"),
        ("import os; os.listdir('/')", "reading outside the temporary folder: /"),
        ("import os.path as p; p.realpath = lambda x: '.'\nopen('/usr/x', 'w')", "writing outside"),
    ],
)
def test_refusals(program: str, said: str, way: Isolation) -> None:
    done = do(program, way)
    assert (done.how, last(done).startswith("Refused"), said in last(done)) == ("refused", True, True), done.output


def test_home_is_neither_written_nor_read(way: Isolation, tmp_path: Path) -> None:
    mark = Path.home() / f"sandbox-{uuid.uuid4().hex}"
    assert do(f"open({str(mark)!r}, 'w').write('x')", way).how == "refused"
    assert not mark.exists()
    secret = tmp_path / "secret"
    secret.write_text("key")
    done = do(f"print(open({str(secret)!r}).read())", way)
    assert done.how == ("refused" if way == "process" else "failed")  # bubblewrap's /tmp is another
    assert "key\n" not in done.output


def test_the_environment_holds_no_secrets(way: Isolation, monkeypatch: pytest.MonkeyPatch, nothing_left: str) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    done = do("import os; print(*sorted(os.environ)); print(os.environ['HOME'] == os.getcwd())", way)
    names, home = done.output.splitlines()
    assert set(names.split()) <= {"HOME", "LC_ALL", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR", "USER", nothing_left}
    assert home == "True"


# ---- the walls, with the guard disarmed


def test_disarming_works(way: Isolation, forks: None) -> None:
    """Else the tests below would show nothing."""
    assert do(DISARM + "import os\nif os.fork() == 0: os._exit(7)\nprint(os.wait()[1] >> 8)", way).output == "7\n"


def test_a_fork_bomb_is_bounded_and_ends(way: Isolation, forks: None) -> None:
    done = do(
        DISARM
        + """
import os, time
made = 0
while made < 500:
    try:
        if os.fork() == 0:
            time.sleep(99)
    except OSError:
        break
    made += 1
print(made, flush=True)
while True:
    try: os.fork()
    except OSError: pass
""",
        way,
        seconds=1,
    )
    assert done.how == "timeout"
    assert 0 < int(done.output.split()[0]) <= 64


def test_a_daemon_does_not_outlive_its_program(way: Isolation, forks: None) -> None:
    done = do(
        DISARM
        + """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "98765"])
    os._exit(0)
os.wait(); time.sleep(0.2)
print("left")
""",
        way,
    )
    assert (done.ok, done.output) == (True, "left\n")  # the fixture finds no sleeper


@needs_bubblewrap
def test_a_daemon_without_environment_in_bubblewrap(forks: None) -> None:
    seconds = str(uuid.uuid4().int % 10**9 + 10**6)
    program = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid(); os.execve('/bin/sleep', ['sleep', '{seconds}'], {{}})"
    )
    assert do(DISARM + program + "\ntime.sleep(0.2)", "bubblewrap").ok
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert seconds.encode() not in (process / "cmdline").read_bytes()
        except OSError:
            continue


@needs_bubblewrap
def test_files_and_ports_of_the_machine_are_out_of_bubblewraps_sight(tmp_path: Path, forks: None) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = do(
            DISARM
            + f"""
import os, socket
def attempt(f):
    try: print("did", f())
    except OSError as error: print(type(error).__name__)
attempt(lambda: open({str(secret)!r}).read())
attempt(lambda: open("/usr/x", "w"))
attempt(lambda: os.mkdir("/x"))
attempt(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2))
attempt(lambda: os.chroot("/"))
print(max(int(p) for p in os.listdir("/proc") if p.isdecimal()) < 10, sorted(os.listdir(".")))
""",
            "bubblewrap",
        )
    assert "did" not in done.output, done.output
    assert last(done) == "True []"


@pytest.mark.parametrize(
    "program",
    [
        "os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chmod('a', 0)",
        "for _ in range(1200): os.mkdir('d'); os.chdir('d')",
        "os.rmdir(os.getcwd())",
    ],
)
def test_files_left_behind_go(program: str, way: Isolation) -> None:
    done = do(f"import os\n{program}", way)
    assert done.ok or "rmdir" in program, done


def test_a_link_out_of_the_folder_is_not_followed_when_it_goes(way: Isolation, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o750)
    (kept / "file").write_text("x")
    assert do(f"import os\nos.symlink({str(kept)!r}, 'link')", way).ok
    assert (kept / "file").exists() and kept.stat().st_mode & 0o777 == 0o750


def test_files_are_limited(way: Isolation) -> None:
    assert "File too large" in last(do("f = open('x', 'wb')\nwhile True: f.write(b'x' * 1_000_000)", way))


# ---- the ways themselves


def test_many_at_once(way: Isolation) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = [o.output for o in pool.map(lambda n: do(f"print({n})", way), range(16))]
    assert outputs == [f"{n}\n" for n in range(16)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to look in")
def test_a_program_ends_with_the_process_that_started_it(way: Isolation, nothing_left: str, tmp_path: Path) -> None:
    code = f"""
import tempfile
from sftflow.sandbox import execute as run
run.TAG, tempfile.tempdir = {nothing_left!r}, {str(tmp_path)!r}
run.run_python("while True: pass", seconds=100, isolation={way!r})
"""
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)})
    try:
        assert until(lambda: len(carrying(nothing_left)) > 0, 20)
        time.sleep(0.3)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert until(lambda: not carrying(nothing_left), 10)


def until(holds: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    assert callable(holds)
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    why_no_bubblewrap.cache_clear()
    try:
        assert isolation_available() == ("process",)
        assert run_python("pass").isolation == "process"
        with pytest.raises(RunError) as caught:
            run_python("pass", isolation="bubblewrap")
        reason = "bwrap is not installed" if platform.system() == "Linux" else "bubblewrap is for Linux"
        assert str(caught.value) == (
            f"sandbox: {reason}; install bubblewrap where user namespaces are allowed, or ask for process"
        )
    finally:
        why_no_bubblewrap.cache_clear()


def test_an_interpreter_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    monkeypatch.setattr(run, "python", lambda: false)
    with pytest.raises(RunError) as caught:
        run_python("pass", isolation="process")
    assert str(caught.value) == (f"sandbox: the interpreter did not start (exit status 1); check that {false} runs")


def test_unprivileged_users_are_held_as_well(tmp_path: Path) -> None:
    """As root this file shows what root's programs meet; the same, from a user without rights."""
    python = "/usr/bin/python3"
    ready = "import sys, sftflow.sandbox; assert sys.version_info >= (3, 11)"
    if os.geteuid() or not Path(python).exists():
        pytest.skip("needs root, and a Python that others may run")
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "text": True, "capture_output": True}
    environment = {"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    if subprocess.run([python, "-c", ready], env=environment, **as_nobody).returncode:  # type: ignore[call-overload]
        pytest.skip("the package is not readable for others")
    bomb = DISARM + (
        "import os, time\nn = 0\nwhile n < 500:\n    try:\n        if os.fork() == 0: time.sleep(99)\n"
        "    except OSError: break\n    n += 1\nprint(n, os.getuid())"
    )
    code = f"""
import os, tempfile
from sftflow.sandbox import isolation_available, run_python
for way in isolation_available():
    done = run_python({bomb!r}, seconds=5, isolation=way)
    print(way, done.how, *done.output.split())
    print(run_python("while True: pass", seconds=0.5, isolation=way).how)
tempfile.tempdir = tempfile.mkdtemp()
assert run_python("import os; os.makedirs('a/b'); os.chmod('a', 0); os.chmod('.', 0)", isolation="process").ok
os.rmdir(tempfile.tempdir)
"""
    command = [python, str(REFUSING), "landlock,seccomp", python, "-c", code]
    done = subprocess.run(command, env=environment, **as_nobody)  # type: ignore[call-overload]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert (len(lines) in (2, 4), done.returncode) == (True, 0), done.stderr
    for bombed, looped in zip(lines[::2], lines[1::2], strict=True):
        assert (bombed[1], bombed[3], looped) == ("passed", "65534", ["timeout"])
        # Where the machine grants no user namespace, this user's processes outside are counted, too.
        assert int(bombed[2]) < 500


def test_the_interpreter_is_the_one_of_the_package() -> None:
    done = run_python("import sys; print(sys.version)", isolation="process")
    assert done.output.strip() == sys.version
    assert os.path.samefile(bubblewrap.python(), sys.executable)
