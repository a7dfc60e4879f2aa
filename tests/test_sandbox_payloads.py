"""Programs that try to get out of the `process` sandbox, as an ordinary user and as root, on kernels with and without
Landlock, seccomp and namespaces; with the guard and past it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftflow
from helpers import payloads
from helpers.sandbox_matrix import KEY
from sftflow.sandbox import run_python, walls

SOURCE, HELPERS = Path(sftflow.__file__).parent.parent, Path(__file__).parent / "helpers"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")
# One of each kind, for every day; the rest is run with -m slow.
FEW = """
append to a file, read a file, a hard link out, truncate, change a mode, change times, set an attribute
a folder's descriptor and .., chdir out, then write, dbm, history written, history read, a database by URI
a database by escapes, a database of one's own kind, a database attached by value, a database vacuumed, a pipe, a node
chdir out, then a pipe, ctypes, another interpreter, a semaphore that stays, multiprocessing, spawned, fork_exec
a signal by descriptor, a signal by a descriptor's owner, the parent's priority, the parent's environment, UDP
a socket by a pair, an abstract socket
"""
# Past the guard these come to their end having done nothing: they use native code, or ask and are not told.
END = {"a module of one's own", "the system's log", "another interpreter", "test code of Python"}
FORMS = {"with the guard": "", "past it": payloads.DISARM}
Row = tuple[str, str, str, list[str], list[str]]  # of sandbox_matrix: name, how, last line, what it disturbed, walls
KERNELS = ("", "landlock", "landlock,seccomp", "landlock,seccomp,namespaces")


def few() -> dict[str, str]:
    out = {name: program for name, program in payloads.PAYLOADS.items() if name in FEW}
    assert len(out) >= 30
    return out


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter: pytest's own is for one alone."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def tried(
    programs: dict[str, str], place: Path, who: str, missing: str
) -> list[tuple[str, str, str, list[str], list[str]]]:
    """Each program in a sandbox that `who` started on a kernel that lacks something -> what sandbox_matrix tells."""
    python, options = sys.executable, {}
    environment = {
        "PYTHONPATH": str(SOURCE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
        "TMPDIR": "/tmp",
    }
    if (os.geteuid() == 0) != (who == "root"):
        ready = "import sys, sftflow.sandbox; assert sys.version_info >= (3, 11)"
        python, options = "/usr/bin/python3", {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
        if who == "root" or subprocess.run([python, "-c", ready], env=environment, **options).returncode:
            pytest.skip("needs to be root, and the package and a Python that others may use")
        os.chown(place, 65534, 65534)
    command = [
        python,
        str(HELPERS / "refusing.py"),
        missing,
        python,
        str(HELPERS / "sandbox_matrix.py"),
        str(place / "home"),
    ]
    done = subprocess.run(
        command, input=json.dumps(programs), env=environment, text=True, capture_output=True, **options
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, [row[0] for row in rows]) == (0, list(programs)), done.stderr  # the parent lived on
    assert not any(wall.partition("-")[0] in missing for wall in rows[0][4])
    return rows


def got_out(rows: list[tuple[str, str, str, list[str], list[str]]], end: set[str]) -> list[str]:
    return [
        f"{name}: {how} {said} {did}"
        for name, how, said, did, _ in rows
        if did or (how == "passed" and name not in end)
    ]


@pytest.mark.parametrize("missing", ["", "landlock,seccomp,namespaces"])
def test_a_users_files_and_processes_are_safe_from_programs(missing: str, place: Path) -> None:
    assert got_out(tried(few(), place, "user", missing), set()) == []


def test_past_the_guard_the_walls_hold(place: Path) -> None:
    """Landlock and seccomp alone: where containers are without the right to make namespaces."""
    rows = tried({name: payloads.DISARM + p for name, p in few().items()}, place, "user", "namespaces")
    if not ("seccomp" in rows[0][4] and any(wall.startswith("landlock") for wall in rows[0][4])):
        pytest.skip(f"this kernel's walls: {rows[0][4]}")
    assert got_out(rows, END) == []


def test_the_payloads_do_their_harm_where_nothing_holds_them(place: Path) -> None:
    """Else the tests here would show nothing."""
    wanted = ["append to a file", "read a file", "change a mode", "a pipe", "a database", "fork_exec", "UDP"]
    wanted += ["a signal by descriptor", "the parent's priority", "an abstract socket"]
    programs = {name: payloads.DISARM + payloads.PAYLOADS[name] for name in wanted}
    rows = tried(programs, place, "user", KERNELS[-1])
    assert [row[0] for row in rows if row[3]] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("who", ["user", "root"])
def test_every_payload_on_every_kernel(who: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how many of how many are held. Past the guard and without Landlock nothing holds a user's files."""
    table, failures = [], []
    for form, before in FORMS.items():
        for missing in KERNELS if form == "with the guard" else ("", "namespaces", "landlock"):
            for folder in place.iterdir():
                shutil.rmtree(folder)
            rows = tried({name: before + p for name, p in payloads.PAYLOADS.items()}, place, who, missing)
            found = got_out(rows, END if before else set())
            kernel = f"without {missing.replace(',', ', ')}" if missing else "whole"
            table.append(f"{who:4} | kernel {kernel:38} | {form:14} | {len(rows) - len(found)} of {len(rows)} held")
            if form == "with the guard" or {"landlock", "seccomp"} <= {wall.partition("-")[0] for wall in rows[0][4]}:
                failures += [f"{table[-1]}: {line}" for line in found]
    with capsys.disabled():
        print("", *table, sep="\n")
    assert failures == []


@pytest.mark.parametrize("abi", range(1, 8))
def test_landlock_of_every_age(abi: int, tmp_path: Path) -> None:
    """What an older kernel does not know is not asked of it; what it knows is held."""
    code = f"""
import ctypes, os, sys
from sftflow.sandbox import walls
libc = ctypes.CDLL(None, use_errno=True)
class Older:
    def __init__(self): self.syscall = self
    def __call__(self, number, *args):
        known = libc.syscall(number, *args)
        return min(known, {abi}) if number == walls.CREATE_RULESET and args[-1] else known
libc.prctl(38, 1, 0, 0, 0)
os.chdir({str(tmp_path)!r})
print(walls.landlock(Older(), "own", ["/usr", "/nowhere"], ["/dev/null"]))
open("own/x", "w").write("x"), open("/dev/null", "w").write("x"), os.listdir("/usr")
for path, mode in (("secret", "r"), ("secret", "a"), ("/usr/x", "w"), ("/etc/passwd", "r")):
    try: open(path, mode)
    except PermissionError: print("held")
"""
    (tmp_path / "own").mkdir()
    (tmp_path / "secret").write_text(KEY)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, text=True, capture_output=True
    )
    if done.stdout.startswith("0\n"):
        pytest.skip("this kernel has no Landlock")
    assert done.stdout == f"{min(abi, int(done.stdout.split()[0]))}\nheld\nheld\nheld\nheld\n", done.stderr


def test_the_filter_knows_the_system_calls_by_their_numbers() -> None:
    """Against the C library's headers, where they are; aarch64 has the generic table."""
    headers = {0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1: "/usr/include/asm-generic/unistd.h"}
    for column, header in headers.items():
        if not Path(header).exists():
            pytest.skip(f"no {header}")
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
        rules = [rule.split() for rule in walls.REFUSED.split(",")]
        assert len(rules) > 80
        for name, *numbers in rules:
            if name in known or (numbers[column] != "-" and int(numbers[column]) < 440):
                assert known.get(name) == numbers[column], name


# A call, by its numbers on x86_64 and aarch64, its arguments, and whether the filter lets it through.
CALLS = [
    ((257, 56), (0, 0, 0), True),  # openat
    ((56, 220), (0x3D0F00, 0, 0), True),  # clone, a thread
    ((56, 220), (0x1200011, 0, 0), False),  # clone, a process
    ((59, 221), (1, 1, 1), False),  # execve
    ((62, 129), (os.getpid(), 9), True),  # kill, itself
    ((62, 129), (1, 9), False),
    ((62, 129), (0xFFFFFFFF, 9), False),
    ((72, 25), (1, 6, 0), True),  # fcntl, a lock
    ((72, 25), (1, 8, 1), False),  # fcntl, an owner
    ((280, 88), (3, 0, 0), True),  # utimensat, by descriptor
    ((280, 88), (3, 1 << 40, 0), False),
    ((280, 88), (3, 1, 0), False),
    ((53, 199), (1, 0x80001, 0), True),  # socketpair, streams
    ((53, 199), (1, 2, 0), False),
    ((41, 198), (2, 2, 0), False),  # socket
    ((302, 261), (0, 7, 0), True),  # prlimit64, its own
    ((302, 261), (7, 7, 0), False),
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_the_filter_lets_through(machine: str) -> None:
    """By the rules of the kernel's machine (seccomp_filter.rst), so that the other architecture is tried as well."""
    steps = walls.bpf(machine)
    assert all(most < 256 for step in steps for most in step[1:3]) and len(steps) < 4096

    def answer(number: int, arguments: tuple[int, ...], architecture: int) -> int:
        data, at, value = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments))), 0, 0
        while True:
            code, yes, no, k = steps[at]
            if code == 0x06:
                return k
            if code == 0x20:
                value, jump = struct.unpack_from("=I", data, k)[0], 0
            else:
                jump = yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no
            at += 1 + jump

    this, other = walls.ARCHITECTURES[machine], 0x40000003  # 32-bit x86
    for numbers, arguments, passes in CALLS:
        number = numbers[machine == "aarch64"]
        assert answer(number, arguments, this) == (0x7FFF0000 if passes else 0x00050001), (number, arguments)
        assert answer(number, arguments, other) == 0x00050001
    assert answer(435, (0, 0), this) == 0x00050026  # clone3: no such call
    assert answer(0x40000000 | 39, (), this) == 0x00050001


def test_an_outcome_tells_its_walls() -> None:
    stood = run_python("pass", isolation="process").walls
    assert set(w.partition("-")[0] for w in stood) <= {"namespaces", "user", "landlock", "seccomp"}
    assert ("user" in stood) <= (os.geteuid() == 0)
    has = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
    assert (f"landlock-{has}" in stood) == (has > 0)
