"""What the machine leaves this process, read from real-looking /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftflow.foundation.runtime import free_memory

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
