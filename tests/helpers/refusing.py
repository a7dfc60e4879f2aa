"""A kernel without Landlock, seccomp or namespaces, so far as a command can tell: `refusing.py landlock COMMAND`.

A filter of system calls, which the command and all it starts inherit, answers as such a kernel does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

X86 = os.uname().machine == "x86_64"
ALLOW, ANSWER = 0x7FFF0000, 0x00050000
# what is missing -> (system call, the value its first argument must have or None, the error)
MISSING = {
    "landlock": [(444, None, errno.ENOSYS)],
    "seccomp": [(157 if X86 else 167, 22, errno.EINVAL), (317 if X86 else 277, None, errno.ENOSYS)],
    "namespaces": [(272 if X86 else 97, None, errno.EPERM)],
}


def refuse(missing: list[str]) -> None:
    steps = [(0x20, 0, 0, 0)]
    for number, first, error in (rule for name in missing for rule in MISSING[name]):
        test = [] if first is None else [(0x20, 0, 0, 16), (0x15, 0, 1, first)]
        steps += [(0x15, 0, len(test) + 1, number), *test, (0x06, 0, 0, ANSWER | error)]
        steps += [(0x20, 0, 0, 0)] if test else []
    code = b"".join(struct.pack("=HBBI", *step) for step in [*steps, (0x06, 0, 0, ALLOW)])
    kept = ctypes.create_string_buffer(code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)
    if libc.prctl(22, 2, struct.pack("@HP", len(code) // 8, ctypes.addressof(kept)), 0, 0):
        raise OSError(ctypes.get_errno(), "the filter is not taken")


if __name__ == "__main__":
    if sys.argv[1]:
        refuse(sys.argv[1].split(","))
    os.execv(sys.argv[2], sys.argv[2:])
