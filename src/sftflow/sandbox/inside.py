"""The first code of the sandboxed interpreter: give up every right, then run the program, then say how it ended.

It stands alone: its text and the guard's travel on the command line, so that nothing of the package need be visible.

    standard input: a file of a token (32 bytes) and the program; the token is read only after the program has returned
    arguments: the report's descriptor, seconds, MiB, the user id to become where it starts as root, "namespaces" where
        it is to enter them itself or "", then the folders and files that may be read
    report: "ready" and the walls that stand as the program begins, {"how": ..., "token": ...} as it ends; no program
        passes without the token
"""

from __future__ import annotations

import ctypes
import json
import linecache
import os
import resource
import signal
import sys
import traceback
import types
from typing import Any, NoReturn

if __package__:
    from sftflow.sandbox import guard, walls

TOKEN = 32
NEWUSER, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x10000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000  # sched.h
PDEATHSIG, KEEPCAPS, NO_NEW_PRIVS = 1, 8, 38  # prctl.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2  # capability.h
CAPABILITY_VERSION_3 = 0x20080522
PROCESSES = 16
FILE_BYTES = 16 << 20
OPEN_FILES = 64
NOBODY = 65534


def main() -> None:
    report, seconds, memory_mib, user = (int(x) for x in sys.argv[1:5])
    source, program = take_program()
    linux = sys.platform.startswith("linux")
    libc = ctypes.CDLL(None, use_errno=True) if linux else None
    standing, began_as, own_users = [], os.geteuid(), False
    if libc:
        libc.prctl(PDEATHSIG, signal.SIGKILL)
        entered = sys.argv[5] == "namespaces" and enter_namespaces(libc)
        own_users = entered and began_as != 0
        if entered or not sys.argv[5]:
            standing.append("namespaces")
    set_limits(seconds, memory_mib, alone=own_users or (began_as == 0 and user > 0))
    if libc:
        give_up_rights(libc, user)
        if os.geteuid() != began_as:
            standing.append("user")
        if abi := walls.landlock(libc, os.getcwd(), sys.argv[6:], guard.DEVICES):
            standing.append(f"landlock-{abi}")
        if walls.seccomp(libc):
            standing.append("seccomp")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]  # a program that wants it meets the guard
    guard.install(os.getcwd(), sys.argv[6:])
    run(program, source, report, standing)


def take_program() -> tuple[int, str]:
    """(descriptor of the source file, program); standard input is empty from here on."""
    source = os.dup(0)
    size = os.fstat(source).st_size
    data = b""
    while len(data) < size - TOKEN and (block := os.pread(source, size, TOKEN + len(data))):
        data += block
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return source, data.decode("utf-8", "surrogatepass")


def enter_namespaces(libc: Any) -> bool:
    """Where the kernel lets us: no network, processes of our own, and users where we are not root.

    The program goes on as process 2. Process 1 only waits: when it ends the kernel kills all others, whatever session
    they moved to.
    """
    user, group = os.getuid(), os.getgid()
    # Root stays in the user namespace it is in: limits on the number of processes never bind root, by whatever name.
    flags = NEWNET | NEWIPC | NEWUTS | NEWPID | (NEWUSER if user else 0)
    if libc.unshare(flags):
        return False
    if user:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w", encoding="ascii") as f:
                f.write(text)
    wait_if_parent(os.fork())
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    wait_if_parent(os.fork())
    return True


def wait_if_parent(child: int) -> None:
    """The child returns; the parent stays until the child ends, and ends as it did."""
    if not child:
        return
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def set_limits(seconds: int, memory_mib: int, *, alone: bool) -> None:
    """Limits of this process and of what it starts; none can be raised again without rights it is about to lose.

    alone: the user's processes are counted apart from those outside (by Linux before 5.14 not: there the program gets
    neither processes nor threads).
    """
    memory = memory_mib << 20
    wanted = {"CPU": seconds, "AS": memory, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0, "MEMLOCK": 0}
    others = 0 if alone else count_tasks(os.getuid())
    if others is not None:
        wanted["NPROC"] = others + PROCESSES
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        top = most + 1 if name == "CPU" and hard == resource.RLIM_INFINITY else most  # SIGXCPU first, then SIGKILL
        try:
            resource.setrlimit(kind, (most, top))
        except (ValueError, OSError):  # macOS knows some of them by name only
            continue


def count_tasks(user: int) -> int | None:
    """Processes and threads a user has now: the limit counts them all."""
    try:
        pids = [p for p in os.listdir("/proc") if p.isdecimal()]
    except OSError:
        return None
    total = 0
    for pid in pids:
        try:
            if os.stat(f"/proc/{pid}").st_uid == user:
                total += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:  # it has ended meanwhile
            continue
    return total


def give_up_rights(libc: Any, user: int) -> None:
    """Root becomes a user nobody else is; all capabilities go; nothing executed later can bring any back."""
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    keep = 0
    if os.geteuid() == 0 and user:
        if not (open_to_all(os.path.dirname(os.__file__)) and open_to_all(os.getcwd())):
            # Python lives below a folder of root's alone (/root): the program must be able to read it to import.
            keep = held_capabilities(libc) & CAP_DAC_READ_SEARCH or held_capabilities(libc) & CAP_DAC_OVERRIDE
            libc.prctl(KEEPCAPS, 1, 0, 0, 0)
        for number in (user, NOBODY):  # a container may know but a few numbers
            try:
                os.setgroups([])
                if os.stat(".").st_uid == 0 and os.stat(".").st_mode & 0o022 == 0:
                    os.chown(".", number, number)
                os.setresgid(number, number, number)
                os.setresuid(number, number, number)
                break
            except OSError:
                continue
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0))
    libc.prctl(PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it


def open_to_all(path: str) -> bool:
    """Whether any user may enter a folder, so far as modes say."""
    while path and path != os.path.dirname(path):
        if not os.stat(path).st_mode & 0o001 and os.path.realpath(path) != os.path.realpath(os.getcwd()):
            return False
        path = os.path.dirname(path)
    return True


def held_capabilities(libc: Any) -> int:
    header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    return 0 if libc.capget(header, data) else int(data[1])


def run(program: str, source: int, report: int, standing: list[str]) -> NoReturn:
    """Run the program as `__main__`, then report and leave at once: its threads and exit handlers do not run on.

    standing: the walls around it, told as it begins.
    """
    # Bound now: a program that replaces os.pread or json.dumps does not change the report.
    read, write, leave, dumps, token = os.pread, os.write, os._exit, json.dumps, TOKEN
    out, err, show = sys.stdout, sys.stderr, traceback.print_exception
    ends = {MemoryError: "memory", SystemExit: "exited", guard.Refused: "refused", guard.RefusedModule: "refused"}
    how, ended = "failed", None
    linecache.cache["<program>"] = (len(program), None, program.splitlines(keepends=True), "<program>")
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program"]
    write(report, f"{' '.join(['ready', *standing])}\n".encode())
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        how = "passed"
    except BaseException as error:
        ended = error
    try:
        out.flush()
        if ended is not None:
            how = ends.get(type(ended), "failed")
            show(type(ended), ended, own_frames(ended.__traceback__), limit=-8, file=err)
        err.flush()
    except BaseException as error:  # an error whose own text cannot be made, no memory to make it
        write(2, type(error).__name__.encode() + b"\n")
    proof = read(source, token, 0).decode("ascii") if how == "passed" else ""
    write(report, dumps({"how": how, "token": proof}).encode())
    leave(0)


def own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without our frame at its beginning and the guard's at its end."""
    first = at = trace.tb_next if trace else None
    while at is not None:
        after = at.tb_next
        if after is not None and after.tb_frame.f_code.co_filename == "<guard>":
            at.tb_next = None
        at = at.tb_next
    return first


if __name__ == "__main__":
    main()
