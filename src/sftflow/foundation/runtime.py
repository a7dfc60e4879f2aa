"""Device, precision and threads as plain values; nothing is probed at import."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sftflow.foundation.errors import RecipeError

Precision = Literal["fp32", "bf16"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how precisely a model runs.

    device: "cpu", "cuda" or "mps".
    precision: "bf16" means bf16 autocast over fp32 weights; "fp32" means no autocast.
    reason: why this precision was chosen, for the resolved recipe.
    """

    device: str
    precision: Precision
    reason: str

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which matrix products run in this runtime's precision."""
        import torch

        if self.precision == "bf16":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep large freed blocks for the next request instead of giving them back at once.

    A training step asks for the same large blocks again and again; giving each back means that the kernel fills it
    with zeros, page by page, before its next use (a sixth of the time of a step on CPU). Elsewhere: nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class KeptMemory:
    """Gives back what `keep_freed_memory` has kept, when it has grown.

    Steps ask for blocks of other sizes each time, so what is kept falls into pieces that no block fits into, and grows
    from step to step (from 1.4 to 3.2 GiB in 280 steps of a small model). Giving all back costs the next step a sixth
    of its time; it is done when the process holds a quarter more than it did after the step that followed.
    """

    def __init__(self) -> None:
        self.limit, self.settling = 0.0, 2  # the first steps ask for what stays

    def after_step(self) -> None:
        """To be called between two steps."""
        held = resident_memory()
        if self.settling:
            self.settling -= 1
            self.limit = max(self.limit, 1.25 * held)
        elif held > self.limit:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            self.settling = 1
            if trim is not None:
                trim(0)


def resident_memory() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (a capability, never a timing)."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        # Exactly the test oneDNN's own bf16 kernels make: avx512_bf16 or AMX on x86, bf16 on ARM.
        caps = torch.backends.cpu.get_cpu_capability()
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return bool(native or amx or "SVE" in caps)
    return False


def detect(precision: str = "auto", device: str | None = None) -> Runtime:
    """Choose the device, and the precision by capability where it is "auto"."""
    import torch

    if precision not in ("auto", "fp32", "bf16"):
        raise RecipeError("precision", f"it should be 'auto' or 'fp32' or 'bf16' (given: {precision!r})", "write one")
    if device is None:
        mps = getattr(torch.backends, "mps", None)
        device = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    if precision == "fp32":
        return Runtime(device=device, precision="fp32", reason="asked for")
    if precision == "bf16":
        return Runtime(device=device, precision="bf16", reason="asked for")
    if has_native_bf16(device):
        return Runtime(device=device, precision="bf16", reason=f"{device} multiplies bf16 natively")
    return Runtime(device=device, precision="fp32", reason=f"{device} has no native bf16 products")


PEAK_SECONDS = 0.25  # what measuring the peak may take on a CPU, about


def measure_peak(runtime: Runtime) -> float:
    """The device's matrix products in FLOP/s: the best of a few square ones, in the run's own precision.

    Only ever shown to the person watching; nothing of a run may depend on a timing. It draws from a generator of
    its own, so that the run's random numbers stay as they were.
    """
    import torch

    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    source = torch.Generator(runtime.device).manual_seed(0)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(runtime.device, lambda: None)
    began, best = time.perf_counter(), 0.0
    # A small product first: on a slow processor a large one alone would take longer than all may.
    on_cpu = runtime.device == "cpu"
    for n in (512, 512, 1024, 1024, 2048, 2048) if on_cpu else (2048, 2048, 4096, 4096, 4096, 4096):
        flops = 2.0 * n**3
        left = PEAK_SECONDS - (time.perf_counter() - began)
        if on_cpu and best and flops / best > left:
            break
        x = torch.randn(n, n, generator=source, device=runtime.device).to(dtype)
        synchronize()
        start = time.perf_counter()
        _ = x @ x
        synchronize()
        best = max(best, flops / max(1e-9, time.perf_counter() - start))
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # these matrices are not the run's memory
    return best


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has free, or less where its control group (a container,
    a batch job) is limited; 0 where the system does not say.   root: where /proc and /sys are."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):  # not Linux
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return 0
    return max(0, min([free, *_group_rooms(root)]))


def _group_rooms(root: Path) -> Iterator[int]:
    """What each limited memory control group above this process has left (cgroup versions 2 and 1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:  # "0::/path", or "4:memory:/path" of version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # A limit binds all groups below it. Inside a container the path may be one that only the host has: its own
        # group is then what is mounted at the top.
        for place in [group, *group.parents]:
            try:
                room = int((place / limit).read_text()) - int((place / usage).read_text())
                stat = dict(x.split() for x in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or "max"
                stat, room = {}, None
            if room is not None:
                # Files that were read count as used, and are let go of when memory is needed.
                yield room + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            if place == top:
                break


def peak_memory(device: str) -> int:
    """The most memory this process has held so far, in bytes: tensors on CUDA, the resident set elsewhere.

    0 where the system does not say.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB


def out_of_memory(error: BaseException) -> bool:
    """Whether torch has said so: OutOfMemoryError on an accelerator, a RuntimeError of its allocator on the CPU.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
