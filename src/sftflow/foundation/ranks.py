"""The processes of one run. torchrun, or `--nproc`, starts them; each knows its rank and how many there are.

    with joined() as ranks:                    # the process group that the environment names; without one, just this
        parts = ranks.gather(mine)             # every rank's value, in the order of ranks, on each of them
        if ranks.first: ...                    # rank 0 alone writes files and says something

What one process computes is what `Ranks()` computes: every method has its meaning for a world of one.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sftflow.foundation.errors import CheckpointError

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

    @contextmanager
    def patient(self) -> Iterator[Callable[[Any], list[Any]]]:
        """Gives a `gather` for what takes some ranks hours while the others wait. They wait in it, not before it: so
        they notice when one of them ends."""
        if self.world == 1:
            yield self.gather
            return
        import torch.distributed as dist

        group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

        def gather(value: Any) -> list[Any]:
            out: list[Any] = [None] * self.world
            dist.all_gather_object(out, value, group=group)
            return out

        yield gather
        dist.destroy_process_group(group)

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

    def all_end(self, seconds: float = ROOT_CAUSE_SECONDS) -> bool:
        """Whether every process of the run comes here within so many seconds: then none of them was killed."""
        if self.store is None:
            return True
        until, more = time.monotonic() + seconds, 1
        try:
            while self.store.add("sftflow/ending", more) < self.world:
                if time.monotonic() > until:
                    return False
                more = 0
                time.sleep(0.1)
        except RuntimeError:  # the store has ended with its host
            return False
        return True


class Count:
    """How much of something all ranks have done so far. All make it at the same place in the program."""

    _made = itertools.count()

    def __init__(self) -> None:
        self._name, self._here = f"sftflow/count/{next(Count._made)}", 0

    def add(self, more: int) -> int:
        """What it is with so much more."""
        self._here += more
        store = ranks().store
        return self._here if store is None else int(store.add(self._name, more))


def dealt(costs: Sequence[float], world: int) -> list[list[int]]:
    """For each rank which parts are its own: the dearest part goes to the rank that has the least.

    >>> dealt([5, 9, 4, 3], 2)
    [[1, 3], [0, 2]]
    """
    out: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    for part in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(world), key=lambda r: (loads[r], len(out[r]), r))
        out[least].append(part)
        loads[least] += costs[part]
    return [sorted(parts) for parts in out]


def shared_out(
    costs: Sequence[float], compute: Callable[[int], T], agree: tuple[type[BaseException], ...] = ()
) -> list[T]:
    """compute(i) of every part, each on one rank; all of them, in their order, on each rank.

    agree: what one rank raises of these kinds, all raise, once each has done its own; what else it raises ends it at
    once, and the others with it.
    """
    here = ranks()
    mine: dict[int, T] = {}
    raised: BaseException | None = None
    with here.patient() as gather:
        try:
            for i in dealt(costs, here.world)[here.rank]:
                mine[i] = compute(i)
        except agree as error:
            raised = error
        parts = gather((mine, raised))
    for _, theirs in parts:
        if theirs is not None:
            raise theirs
    found = {i: value for part, _ in parts for i, value in part.items()}
    return [found[i] for i in range(len(costs))]


def require_shared(out: Path) -> None:
    """Raises CheckpointError where a rank does not see the folder that the first rank writes to. All must come here."""
    here = ranks()
    if here.world == 1:
        return
    mark = out / f".{here.from_first(os.getpid())}.rank-0"
    try:
        if here.first:
            mark.touch()
        here.barrier()
        if not mark.exists():
            fact = f"rank {here.rank} does not see what rank 0 writes there"
            raise CheckpointError(str(out), fact, "name a folder on a disk that all machines share")
        here.barrier()
    finally:
        if here.first:
            mark.unlink(missing_ok=True)


def cores() -> int:
    """The cores of this machine, shared by the ranks that run on it."""
    return max(1, (os.cpu_count() or 1) // (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_launched() else 1))


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

    >>> lost(RuntimeError("Connection closed by peer"))  # a process by itself has lost none
    False
    """
    if _present.world == 1 or not isinstance(error, RuntimeError):
        return False
    if type(error).__name__.startswith("Dist"):  # torch's own: DistBackendError, DistNetworkError, DistStoreError
        return True
    words = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "socket", "tcpstore", "timed out")
    return "out of memory" not in str(error).lower() and any(word in str(error).lower() for word in words)
