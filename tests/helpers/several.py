"""Trainings in several processes: this module is also the program that each of them runs."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Outcome:
    """losses, norms: of each step.   weights: whole ones, at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def launch(world: int, *command: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in `world` processes of one thread each, by torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    outside = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **env}
    return subprocess.run([*run, *command], capture_output=True, text=True, timeout=timeout, env=outside)


def forked(world: int, work: Callable[[], Any]) -> list[int]:
    """Exit codes of `work` in copies of this process that have joined: no library is imported again, so it is quick."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> None:
        from sftflow.foundation.ranks import joined

        torch.set_num_threads(1)  # the others of this process were not copied
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TOKENIZERS_PARALLELISM": "false"}
        code = 1
        try:
            with joined():
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    processes = [multiprocessing.get_context("fork").Process(target=member, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]


def trained(world: int, variants: list[dict[str, Any]], folder: Path) -> list[Outcome]:
    """What `train` gives for each variant, in so many processes; in this one where it is one."""
    if world == 1:
        return [train(variant) for variant in variants]
    (folder / "variants.json").write_text(json.dumps(variants))
    done = launch(world, "-m", "helpers.several", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [Outcome(**torch.load(folder / f"{number}.pt")) for number in range(len(variants))]


def train(variant: dict[str, Any]) -> Outcome:
    """model: of `ARCHITECTURES`.   weighted: whether the examples have weights.   rows: how many examples have labels,
    the others have none; None for `shared_rows`.   state: a folder to go on from, and to save the state in after step
    `until`.   gathered: a folder for the model's file in bf16.   Everything else: settings."""
    from helpers.architectures import tiny
    from helpers.training import BF16, FP32, examples, shared_rows, spec, weighted
    from sftflow.checkpoint.saving import write_gathered
    from sftflow.packing.pack import Example
    from sftflow.recipe import Lora
    from sftflow.training.batch_plan import RowPlan
    from sftflow.training.lora import attach
    from sftflow.training.resume import load_state, save_state, saved_states
    from sftflow.training.trainer import Trainer

    keys = dict(variant)
    state, until, gathered = (keys.pop(name, None) for name in ("state", "until", "gathered"))
    model, rows = tiny(keys.pop("model", "Llama")), keys.pop("rows", None)
    runtime = BF16 if keys.get("precision") == "bf16" else FP32
    data = weighted(shared_rows()) if keys.pop("weighted", False) else shared_rows()
    if rows is not None:
        some = examples(40)
        data = [e if n < rows else Example(ids=e.ids, mask=0 * e.mask) for n, e in enumerate(some)]
    if asked := keys.get("lora"):
        attach(model, Lora(**asked), "base", [3, 7, 319], 0)
    settings = spec(**{"micro_tokens": 128, "steps": 20, "lr": 1e-4, **keys})
    trainer = Trainer(model, RowPlan(data, settings), settings, runtime)
    if state and (saved := trainer.ranks.from_first(saved_states(Path(state)))):
        load_state(saved[-1], trainer, {"data": "a"})
    logs = list(itertools.islice(trainer, (until or settings.steps) - trainer.step))
    if state:
        save_state(Path(state), trainer, {"data": "a"}, {}, keep=1)
    if gathered:
        write_gathered(model, torch.bfloat16, Path(gathered) if trainer.ranks.first else None)
    weights: list[tuple[str, Any]] = list(model.named_parameters())
    whole = {n: (p if type(p) is torch.nn.Parameter else p.full_tensor()).detach().clone() for n, p in weights}
    return Outcome([log.loss for log in logs], [log.grad_norm for log in logs], whole)


def main(folder: Path) -> None:
    from sftflow.foundation.ranks import joined

    with joined() as ranks:
        torch.set_num_threads(1)
        for number, variant in enumerate(json.loads((folder / "variants.json").read_text())):
            outcome = train(variant)
            if ranks.first:
                torch.save(vars(outcome), folder / f"{number}.pt")
    os._exit(0)  # at its end torch now and then aborts a process that has joined a group


def results_in(folder: Path) -> dict[str, str]:
    """What an evaluation or a comparison has written, by file, without what it took and when; the page is drawn from
    the rest."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "report.html")]
    times = re.compile(
        r'"(seconds|asking_seconds|of_training|date|finished|total_evaluation_time_seconds)": ("[^"]*"|[0-9.]+)'
    )
    return {str(p.relative_to(folder)): times.sub(r'"\1": 0', p.read_text(encoding="utf-8")) for p in files}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
