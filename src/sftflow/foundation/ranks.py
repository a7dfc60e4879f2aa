"""The processes of one run. torchrun, or `--nproc`, starts them; each knows its rank and how many there are.

    with joined() as ranks:                    # the process group that the environment names; without one, just this
        parts = ranks.gather(mine)             # every rank's value, in the order of ranks, on each of them
        if ranks.first: ...                    # rank 0 alone writes files and says something

What one process computes is what `Ranks()` computes: every method has its meaning for a world of one.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # `sftflow --help` comes by here
    from numpy.typing import NDArray

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""what torchrun tells each process by its environment"""
ROOT_CAUSE_SECONDS = 5.0
"""how long a process that has lost another waits for that one's own words"""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. rank: 0 <= rank < world.   local_rank: among those of this machine.

    store: torch's key-value store, through which they speak where a collective cannot be.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and says something."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on each of them."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def from_first(self, value: T) -> T:
        """Rank 0's value on all."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        return box[0]  # type: ignore[no-any-return]

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum of every rank's array, added in the order of ranks, so that all have the same to the last bit."""
        import numpy as np

        return np.sum(self.gather(values), axis=0)  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def tells(self) -> bool:
        """Whether this process is the one that tells how the run ended: the first that asks."""
        if self.store is None:
            return self.first
        try:
            return int(self.store.add("sftflow/told", 1)) == 1
        except RuntimeError:  # the store has ended with its host
            return self.first

    def told(self, seconds: float = ROOT_CAUSE_SECONDS) -> bool:
        """Whether some process tells, or has told, how the run ended, within so many seconds."""
        until = time.monotonic() + seconds
        while self.store is not None and time.monotonic() < until:
            try:
                if self.store.check(["sftflow/told"]):
                    return True
            except RuntimeError:
                return False
            time.sleep(0.1)
        return False


_present = Ranks()


def ranks() -> Ranks:
    """This process among those of the run; a world of one where it has joined none."""
    return _present


def is_launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """While it lasts, this process is one of those that the environment names (torchrun's). May be nested, and entered
    again: the group stays until the process ends.

    After an error no rank waits for the others: they may be waiting in a collective, and end with this process.
    """
    global _present
    if _present.world > 1 or not is_launched():
        yield _present
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=1)
    )
    _present = Ranks(rank, world, local, store)
    atexit.register(dist.destroy_process_group)
    yield _present
    _present.barrier()


def lost(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has ended.

    >>> lost(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9133"))
    True
    """
    if _present.world == 1 or not isinstance(error, RuntimeError):
        return False
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "socket", "tcpstore", "timed out")
    return type(error).__module__.startswith("torch") or any(word in str(error).lower() for word in words)
