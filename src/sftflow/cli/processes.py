"""`--nproc N`: the same command in several processes, through torchrun's own launcher; and what each of them prints.

Rank 0 speaks; whichever process fails first tells why, in one line, and the others end without a word.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from sftflow.foundation.errors import RunError
from sftflow.foundation.ranks import is_launched, joined, lost, ranks
from sftflow.training.signals import Stopped

NPROC_HELP = "processes on this machine, each with its share of the rows"
Nproc = Annotated[int, typer.Option("--nproc", min=1, help=NPROC_HELP)]
BY_NPROC = "SFTFLOW_NPROC"
"""set where this command has started the processes, and tells itself of one that was killed"""
RESUME, RERUN = "--resume goes on from the last saved state", "the same command goes on from the finished rows"
goes_on = RESUME
"""what to do about a process that was ended, in the command that runs"""
SAVING_SECONDS = 600
"""how long processes that were asked to stop may take to save"""


@contextmanager
def processes(nproc: int, remedy: str = RESUME) -> Iterator[None]:
    """Run what is inside in `nproc` processes, or in those that torchrun has started: each comes here itself.

    In the process that only starts the others, nothing inside is run.   remedy: of a process that was ended.
    """
    global goes_on
    goes_on = remedy
    if nproc > 1 and not is_launched():
        _launch(nproc)
        raise typer.Exit
    with joined() as ranks:
        if not ranks.first:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the process's end
        yield


def _launch(nproc: int) -> None:
    """Start this command `nproc` times. Raises typer.Exit with the exit code of the rank that failed, which has told
    why; of one that was killed, RunError."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # what it says of a failure, we say in one line
    os.environ[BY_NPROC] = str(nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else each run leaves an empty folder in /tmp
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sftflow", *sys.argv[1:])
    except SignalException as stopped:
        raise typer.Exit(128 + int(stopped.sigval)) from None
    except ChildFailedError as error:
        failures = error.failures
        killed = {rank: -f.exitcode for rank, f in failures.items() if f.exitcode < 0 and -f.exitcode != signal.SIGTERM}
        if killed:
            rank, number = min(killed.items())
            fact = f"it was ended by {signal.Signals(number).name}"
            why = " (the system does that where memory is full)" if number == signal.SIGKILL else ""
            raise RunError(f"rank {rank}", fact + why, goes_on) from None
        code = next((f.exitcode for f in failures.values() if f.exitcode > 0), 1)
        raise typer.Exit(code) from None


def tells(error: BaseException) -> bool:
    """Whether this process is the one that tells of an error, or of having been stopped. Then its standard error is
    open, whichever rank it is."""
    here = ranks()
    if lost(error) and (BY_NPROC in os.environ or here.told()):
        return False  # the root cause is told by another
    if isinstance(error, Stopped) and not error.saved and BY_NPROC in os.environ and not here.all_end():
        return False  # nobody asked for it: the launcher stops us because a rank was killed, which it tells itself
    if not here.tells():
        return False
    if here.world > 1 and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    return True


def leave(code: int) -> None:
    """End the process. One of several ends at once: what it has open to the others must not hold it up."""
    if ranks().world == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
