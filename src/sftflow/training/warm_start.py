"""Warm start: the optimizer's moments of the run that made the base, where that run is at hand.

A base that `sftflow base` trained, or an earlier fine-tuning, leaves its last saved state in `resume/`. The moments
estimate the gradient's scale for every weight; with them the first steps need no estimate of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sftflow.atomic_io import check_hashes, read_record
from sftflow.errors import CheckpointError
from sftflow.training.muon import Muon
from sftflow.training.resume import read_optimizers, saved_states
from sftflow.training.trainer import Trainer

STATE = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
REMEDY = "set train.warm_start: false"


def warm_start(base: Path, trainer: Trainer) -> str:
    """Give a fresh trainer the moments saved beside `base` (a run directory or its checkpoint); says from where.

    Rows that the embeddings have gained since start at zero. Raises CheckpointError where there is no saved state, or
    it is that of another optimizer or model.
    """
    run = base.parent if base.name == "checkpoint" else base
    states = saved_states(run / "resume")
    if not states:
        raise CheckpointError(str(run), "no optimizer state beside the base (resume/ is what holds it)", REMEDY)
    newest = states[-1]
    check_hashes(newest, read_record(newest / "state.json", REMEDY)["sha256"], REMEDY)
    saved, _ = read_optimizers(newest)
    wanted = {
        (number, index): parameter
        for number, optimizer in enumerate(trainer.optimizers)
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    if saved.keys() != wanted.keys():
        raise CheckpointError(str(newest), "its optimizer state is that of another optimizer or model", REMEDY)
    for (number, index), parameter in wanted.items():
        optimizer = trainer.optimizers[number]
        state = saved[number, index]
        if state.keys() != STATE[type(optimizer)]:
            raise CheckpointError(str(newest), f"its state is not that of {type(optimizer).__name__}", REMEDY)
        optimizer.state[parameter] = {name: _with_new_rows(value, parameter, newest) for name, value in state.items()}
    return f"optimizer state taken over from {newest}"


def _with_new_rows(value: torch.Tensor, parameter: torch.Tensor, place: Path) -> torch.Tensor:
    """The moment in its parameter's shape: zeros for rows that were added to an embedding."""
    if value.ndim == 0:
        return value
    if value.shape[1:] != parameter.shape[1:] or len(value) > len(parameter):
        fact = f"a moment of shape {tuple(value.shape)} does not fit a weight of shape {tuple(parameter.shape)}"
        raise CheckpointError(str(place), fact, REMEDY)
    out = torch.zeros_like(parameter, dtype=value.dtype)
    out[: len(value)] = value.to(parameter.device)
    return out
