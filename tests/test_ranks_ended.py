"""Several processes, one of which is killed, stopped or has no space: one line, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from helpers.runs import Quiet, leftovers, outcome, write_recipe
from helpers.several import forked
from sftflow.foundation.atomic_io import check_hashes, read_record
from sftflow.foundation.ranks import ranks
from sftflow.recipe import load_recipe
from sftflow.training.run import run_training

SHARDED = {"shard": "full", "optimizer": "adamw", "lr": 1e-3}


def recipe_of(folder: Path, base: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    return write_recipe(folder, base, **settings)


def steps(out: Path, at_least: int) -> bool:
    metrics = out / "metrics.jsonl"
    return metrics.is_file() and metrics.read_bytes().count(b"\n") >= at_least


def saves(out: Path, step: int) -> bool:
    return any(out.glob(f"resume/.step-{step:08d}.*.tmp"))


# ---- bit for bit

MOMENTS: list[tuple[int, Callable[[Path], bool]]] = [
    (1, lambda out: (out / ".lock").exists()),
    (0, lambda out: steps(out, 6)),
    (1, lambda out: steps(out, 10)),
    (0, lambda out: saves(out, 16)),
    (1, lambda out: saves(out, 20)),
]
"""(the rank that is killed, when)"""


def finished(recipe: Path) -> dict[str, Any]:
    """What the run leaves at its end. Of its state the tensors count: torch writes them in any order."""

    def work() -> None:
        run_training(load_recipe(recipe), Quiet(), resume=True)

    assert forked(2, work) == [0, 0]
    out = recipe.parent / "run"
    assert leftovers(out) == []
    found = {name: value for name, value in outcome(out).items() if "shard-" not in name}
    for path in sorted((out / "resume" / "step-00000020").glob("shard-*")):
        found |= {f"{path.name}/{name}": x.numpy().tobytes() for name, x in load_file(path).items()}
    return found


def killed(recipe: Path, rank: int, moment: Callable[[Path], bool]) -> list[int]:
    """The exit codes of the ranks of a run, one of which is killed at that moment."""

    def work() -> None:
        def watch() -> None:
            while not moment(recipe.parent / "run"):
                time.sleep(0.0002)
            os.kill(os.getpid(), signal.SIGKILL)

        if ranks().rank == rank:
            threading.Thread(target=watch, daemon=True).start()
        run_training(load_recipe(recipe), Quiet(), resume=True)

    return forked(2, work)


@pytest.mark.parametrize(
    ("settings", "moments"),
    [
        pytest.param(SHARDED, MOMENTS[3:4], id="sharded, while saving"),
        pytest.param(SHARDED, MOMENTS, id="sharded", marks=pytest.mark.slow),
        pytest.param(SHARDED | {"lora": {"rank": 4}}, MOMENTS, id="sharded, lora", marks=pytest.mark.slow),
        pytest.param({"shard": "no"}, MOMENTS, id="replicated, muon", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_bitwise(
    settings: dict[str, Any], moments: list[tuple[int, Callable[[Path], bool]]], tiny_base: Path, tmp_path: Path
) -> None:
    whole = finished(recipe_of(tmp_path / "whole", tiny_base, settings))
    recipe = recipe_of(tmp_path / "killed", tiny_base, settings)
    died_saving = 0
    for rank, moment in moments:
        codes = killed(recipe, rank, moment)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (rank, codes)
        died_saving += any(".step-" in name for name in leftovers(recipe.parent / "run"))
        for state in (recipe.parent / "run" / "resume").glob("step-*"):
            check_hashes(state, read_record(state / "state.json", "")["sha256"], "")
    assert died_saving  # the first rank, whose temporary nobody removes until the run goes on
    assert finished(recipe) == whole


@pytest.mark.slow
def test_a_killed_run_goes_on_in_other_numbers_of_ranks_and_otherwise_shared_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    def losses(recipe: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (recipe.parent / "run/metrics.jsonl").read_text().splitlines()]

    def work(recipe: Path) -> None:
        run_training(load_recipe(recipe), Quiet(), resume=True)

    settings = SHARDED | {"lr": 1e-4}
    alone = recipe_of(tmp_path / "alone", tiny_base, settings)
    work(alone)
    for world, shard in [(1, "full"), (2, "no"), (4, "full")]:
        recipe = recipe_of(tmp_path / f"{world}", tiny_base, settings)
        assert killed(recipe, 0, lambda out: steps(out, 10)) == [-signal.SIGKILL, 1]
        recipe.write_text(recipe.read_text().replace('"full"', f'"{shard}"'))
        if world == 1:
            work(recipe)
        else:
            assert forked(world, partial(work, recipe)) == [0] * world
        assert losses(recipe) == pytest.approx(losses(alone), abs=1e-5), (world, shard)


@pytest.mark.slow
def test_fewer_rows_than_ranks_are_saved_and_read_in_any_number(tmp_path: Path) -> None:
    """What the states of sharded runs ask of torch: a rank may have no row, and the last one fewer."""
    whole = {
        "two": torch.arange(10.0).reshape(2, 5),
        "one": torch.arange(7.0).reshape(1, 7).bfloat16(),
        "five": torch.arange(50.0).reshape(5, 10),
    }

    def spread(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (ranks().world,))
        return {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in tensors.items()}

    def save() -> None:
        dcp.save(spread(whole), storage_writer=HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))

    def load() -> None:
        found = spread({name: torch.zeros_like(x) for name, x in whole.items()})
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
        assert all(torch.equal(found[name].full_tensor(), x) for name, x in whole.items())

    assert forked(4, save) == [0] * 4
    assert forked(3, load) == [0] * 3


# ---- one line


class Launched:
    """`sftflow train --resume --nproc 2`, and its ranks."""

    def __init__(self, recipe: Path) -> None:
        words = [sys.executable, "-m", "sftflow", "train", str(recipe), "--resume", "--nproc", "2"]
        self.out = recipe.parent / "run"
        self.name = f"SFTFLOW_TEST_RUN={self.out} {time.monotonic()}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SFTFLOW_TEST_RUN": self.name.partition("=")[2]}
        self.launcher = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.ranks().values():
            os.kill(pid, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks that live."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if self.name.encode() in words:
                found |= {int(word[5:]): int(process.name) for word in words if word.startswith(b"RANK=")}
        return found

    def until(self, reached: Callable[[], bool], seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.launcher.poll() is None and time.monotonic() < deadline, "the moment has not come"
            time.sleep(0.0005)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.ranks()[rank], number)

    def ended(self) -> tuple[int, list[str]]:
        """(exit code, how it said that it ended)"""
        said = self.launcher.communicate(timeout=60)[1].splitlines()
        assert not self.ranks() and not any("Traceback" in line for line in said), said
        return self.launcher.returncode, [x for x in said if x.startswith(("error: ", "stopped"))]


def states(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("resume/step-*"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks through /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 0), (1, 6)])
def test_a_killed_rank_is_told_in_one_line(rank: int, step: int, tiny_base: Path, tmp_path: Path) -> None:
    """In the midst of a step, and before the first: then the others have not met it yet."""
    with Launched(recipe_of(tmp_path / "a", tiny_base, SHARDED)) as run:
        run.until(lambda: steps(run.out, step) if step else len(run.ranks()) == 2 and (run.out / ".lock").exists())
        run.send(rank, signal.SIGKILL)
        code, said = run.ended()
    assert code == 3 and len(said) == 1, said
    assert said[0].startswith(f"error: rank {rank}: it was ended by SIGKILL") and "--resume goes on" in said[0]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("whom", "number"), [("launcher", 2), ("rank 1", 15), ("all", 15)])
def test_a_signal_saves_once(whom: str, number: int, tiny_base: Path, tmp_path: Path) -> None:
    with Launched(recipe_of(tmp_path / "a", tiny_base, SHARDED)) as run:
        run.until(lambda: steps(run.out, 5))
        of_ranks = run.ranks()
        pids = {"launcher": [run.launcher.pid], "rank 1": [of_ranks[1]], "all": [*of_ranks.values(), run.launcher.pid]}
        for pid in pids[whom]:
            os.kill(pid, number)
        code, said = run.ended()
    assert code == 128 + number and said == [f"stopped; the state is saved in {run.out / 'resume'}; --resume goes on"]
    assert len(states(run.out)) == 2 and leftovers(run.out) == []


@needs_proc
@pytest.mark.slow
def test_a_rank_without_space_is_told_in_one_line(tiny_base: Path, tmp_path: Path) -> None:
    import resource

    with Launched(recipe_of(tmp_path / "a", tiny_base, SHARDED)) as run:
        run.until(lambda: steps(run.out, 5))
        resource.prlimit(run.ranks()[1], resource.RLIMIT_FSIZE, (100_000, 100_000))
        code, said = run.ended()
    assert code == 3 and said == [f"error: {run.out}: cannot write (File too large); free space; --resume goes on"]
    assert states(run.out) == ["step-00000004"] and leftovers(run.out) == []
