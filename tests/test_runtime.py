"""What the machine leaves this process, read from real-looking /proc and /sys trees; and its precision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sftflow.foundation.runtime import detect, free_memory

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {60 * GIB >> 10} kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 60),
        ({"proc/self/cgroup": "0::/\n"}, 60),
        # a container of version 2: its own group is the top of what is mounted
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            },
            1.5,
        ),
        # a batch job: no limit of its own, its parent has one
        (
            {
                "proc/self/cgroup": "0::/jobs/one\n",
                "sys/fs/cgroup/jobs/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/jobs/memory.current": f"{5 * GIB}\n",
                "sys/fs/cgroup/jobs/memory.stat": "",
                "sys/fs/cgroup/jobs/one/memory.max": "max\n",
                "sys/fs/cgroup/jobs/one/memory.current": "5\n",
                "sys/fs/cgroup/jobs/one/memory.stat": "",
            },
            3,
        ),
        # version 1, the path of the host and the group of the container
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_the_machine_and_the_group_leave(
    tmp_path: Path, files: dict[str, str], free: float
) -> None:
    assert free_memory(tree(tmp_path, files)) == free * GIB


def test_here_something_is_free() -> None:
    assert 0 < free_memory() < 1 << 50


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch asks the driver is answered as a card of this capability would: a T4 has 7.5, which torch calls
    able of bf16, for it makes up for what is missing, slowly."""
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    found = detect()
    assert (found.device, found.precision) == ("cuda", precision)
    assert (
        found.reason == {"fp32": "cuda has no native bf16 products", "bf16": "cuda multiplies bf16 natively"}[precision]
    )
    assert detect("bf16").reason == "asked for"


KEPT = """
import ctypes
from sftflow.foundation.runtime import KeptMemory, keep_freed_memory, resident_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
kept = KeptMemory()
kept.after_step(), kept.after_step()
blocks = [c.malloc(1 << 20) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
for block in blocks[:-1]:  # the last one stands above them all
    c.free(block)
before = resident_memory()
kept.after_step()
print((before - resident_memory()) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_was_kept_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 190
