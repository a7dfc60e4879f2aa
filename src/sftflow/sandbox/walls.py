"""Walls that a process without any rights builds around itself, for good: Landlock for files, seccomp for the rest.

Like `inside` it stands alone. Each wall is built as far as the kernel knows it, and tells whether it stands.
Landlock: docs.kernel.org/userspace-api/landlock.html   seccomp: docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
BELOW_A_PATH, ASK_VERSION = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# ABI -> the rights on files that came with it: the first thirteen; to move between folders; to truncate; devices.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
TCP, SCOPES = 0b11, 0b11  # bind and connect, ABI 4; abstract Unix sockets and signals, ABI 6


def landlock(libc: Any, folder: str, readable: Iterable[str], devices: Iterable[str]) -> int:
    """From here on files are changed in `folder` alone, and read there and below `readable`. The ABI, 0 for no wall."""
    call = libc.syscall
    call.restype = ctypes.c_long
    abi = call(CREATE_RULESET, None, ctypes.c_size_t(0), ASK_VERSION)
    if abi < 1:
        return 0
    every = sum(right for since, right in FILE_RIGHTS.items() if since <= abi)
    handled = struct.pack("=QQQ", every, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)  # older ones want zeros
    rules = call(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return 0
    reading = EXECUTE | READ_FILE | READ_DIR
    wanted = {**dict.fromkeys(readable, reading), **dict.fromkeys(devices, READ_FILE | WRITE_FILE), folder: every}
    for path, rights in wanted.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # another system's folder
            continue
        granted = rights if os.path.isdir(path) else rights & ~READ_DIR
        call(ADD_RULE, rules, BELOW_A_PATH, struct.pack("=Qi", granted, place), 0)
        os.close(place)
    stands = call(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return int(abi) if stands else 0


# name, number on x86_64, on aarch64 ("-": it has none there); then, where something is left, which argument (from 0)
# must have which value. "self": this process; "null": no pointer. Left are threads but no processes, signals to itself,
# plain uses of descriptors, pairs of stream sockets (asyncio wakes itself through one), and limits that are read.
# and times are set through a descriptor alone: the filter sees no paths, and Landlock sees what is opened.
REFUSED = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, kcmp 312 272, pidfd_getfd 438 438,
kill 62 129 0 self, tgkill 234 131 0 self, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_open 434 434, pidfd_send_signal 424 424, prlimit64 302 261 0 0 self, setpriority 141 140, ioprio_set 251 30,
sched_setaffinity 203 122 0 0 self, sched_setscheduler 144 119 0 0 self, sched_setparam 142 118 0 0 self,
sched_setattr 314 274, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
process_mrelease 448 448, migrate_pages 256 238, move_pages 279 239,
fcntl 72 25 1 0 1 2 3 4 5 6 7 36 37 38 1030 1031 1032 1033 1034,
ioctl 16 29 1 0x5401 0x5413 0x541b 0x5421 0x5450 0x5451 0x802c542a, socket 41 198, bind 49 200, connect 42 203,
socketpair 53 199 1 1 0x801 0x80001 0x80801, mq_open 240 180, mq_unlink 241 181, shmget 29 194, shmat 30 196,
shmctl 31 195, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, semget 64 190, semop 65 193,
semtimedop 220 192, semctl 66 191, inotify_init 253 -, inotify_init1 294 26, getxattr 191 8, lgetxattr 192 9,
getxattrat 464 464, name_to_handle_at 303 264, open_by_handle_at 304 265, syslog 103 116, mknod 133 -, mknodat 259 33,
truncate 76 45, chmod 90 -, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88 1 null, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
setxattrat 463 463, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466,
file_setattr 469 469, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
mount_setattr 442 442, open_tree_attr 467 467, fanotify_init 300 262, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, add_key 248 217,
request_key 249 218, keyctl 250 219
"""
CLONE, CLONE3, CLONE_THREAD = {"x86_64": 56, "aarch64": 220}, 435, 0x10000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # audit.h
SET_SECCOMP, FILTER = 22, 2  # prctl.h, seccomp.h
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # bpf_common.h
ALLOW, REFUSE, UNKNOWN = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def seccomp(libc: Any) -> bool:
    """From here on the kernel refuses what no graded program asks it for; False where there is no such wall."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES or sys.maxsize < 1 << 32:
        return False
    code = [struct.pack("=HBBI", *step) for step in bpf(machine)]
    program = ctypes.create_string_buffer(b"".join(code))
    wanted = struct.pack("@HP", len(code), ctypes.addressof(program))
    if libc.prctl(SET_SECCOMP, FILTER, wanted, 0, 0):
        return False
    for name, flags in (("chmod", os.O_RDONLY), ("utime", os.O_RDONLY), ("truncate", os.O_WRONLY)):
        setattr(os, name, through_descriptor(getattr(os, name), flags))
    return True


def bpf(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter's steps (code, jump if true, jump if false, value) over a system call's number and arguments."""
    refuse, allow = (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)
    out = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCHITECTURES[machine]), refuse]
    out += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 1 << 30), refuse]  # x86_64's second numbers for the same calls
    out += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN)]  # its flags cannot be seen; the C library falls back
    out += [(EQUAL, 0, 4, CLONE[machine]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD), allow, refuse]
    for rule in REFUSED.split(","):
        _, *numbers = rule.split()
        number, (argument, *values) = numbers[machine == "aarch64"], numbers[2:] or ["0"]
        low = 16 + 8 * int(argument)
        test = [(LOAD, 0, 0, low)] if values else []
        for value in values:
            if value == "null":
                test += [(EQUAL, 0, 3, 0), (LOAD, 0, 0, low + 4), (EQUAL, 0, 1, 0), allow]
            else:
                test += [(EQUAL, 0, 1, os.getpid() if value == "self" else int(value, 0)), allow]
        if number != "-":
            out += [(EQUAL, 0, len(test) + 1, int(number)), *test, refuse]
    return [*out, allow]


def through_descriptor(call: Callable[..., None], flags: int) -> Callable[..., None]:
    """A call that takes a path -> the same by way of a descriptor: the filter sees no paths, Landlock sees openings."""

    def by_descriptor(
        path: Any, *args: Any, dir_fd: int | None = None, follow_symlinks: bool = True, **options: Any
    ) -> None:
        if isinstance(path, int):
            return call(path, *args, **options)
        link = 0 if follow_symlinks else os.O_NOFOLLOW
        place = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | link, dir_fd=dir_fd)
        try:
            return call(place, *args, **options)
        finally:
            os.close(place)

    return by_descriptor
