"""Optimizers and learning-rate schedules.

A new optimizer is one function in `OPTIMIZERS`: parameter groups in, a list of torch optimizers out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sftflow.recipe import Schedule, Train
from sftflow.training.muon import Muon

Named = list[tuple[str, torch.nn.Parameter]]

# Muon moves matrices by orthogonalised steps whose size does not depend on the gradient, so its learning rate
# is a fixed multiple of AdamW's in one recipe; `lr` is always AdamW's for the embeddings, norms and biases.
MUON_RATIO = 4.0


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The trainable parameters of a model, by what they are."""

    matrices: Named
    embeddings: Named
    rest: Named


def groups_of(model: Any) -> Groups:
    """Every trainable parameter in one group. Experts held as (experts, out, in) count as matrices."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Groups(
        embeddings=[(n, p) for n, p in named if id(p) in tables],
        matrices=[(n, p) for n, p in named if p.ndim >= 2 and id(p) not in tables],
        rest=[(n, p) for n, p in named if p.ndim < 2 and id(p) not in tables],
    )


def adamw(groups: Groups, settings: Train) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for all; weight decay for matrices, none for norms, biases and embeddings."""
    lr, scale = settings.peak_lr, settings.lr_scale
    parts = [
        (groups.matrices, lr * scale.matrices, settings.weight_decay),
        (groups.embeddings, lr * scale.embeddings, 0.0),
        (groups.rest, lr * scale.rest, 0.0),
    ]
    used = [{"params": [p for _, p in named], "lr": rate, "weight_decay": w} for named, rate, w in parts if named]
    return [torch.optim.AdamW(used, betas=(0.9, 0.95), eps=1e-8, fused=True)] if used else []


def muon(groups: Groups, settings: Train) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else (experts too)."""
    matrices = [p for _, p in groups.matrices if p.ndim == 2]
    experts = [(n, p) for n, p in groups.matrices if p.ndim != 2]
    others = adamw(replace(groups, matrices=experts), settings)
    if not matrices:
        return others
    rate = settings.peak_lr * MUON_RATIO * settings.lr_scale.matrices
    return [Muon(matrices, lr=rate, weight_decay=settings.weight_decay, momentum=0.95, nesterov=True), *others]


OPTIMIZERS: dict[str, Callable[[Groups, Train], list[torch.optim.Optimizer]]] = {"adamw": adamw, "muon": muon}


def make_optimizers(model: Any, settings: Train) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters; each group remembers its peak rate as `peak_lr`."""
    optimizers = OPTIMIZERS[settings.optimizer](groups_of(model), settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, total: int, schedule: Schedule) -> float:
    """The share of the peak learning rate at `step` (0-based) of `total`.

    linear: rise over the first `warmup` share, hold, fall in a straight line to `final` over the last `warmdown`.
    cosine: rise, then half a cosine to `final`.   constant: rise, then hold.

    >>> schedule = Schedule(kind="linear", warmup=0.2, warmdown=0.5, final=0.0)
    >>> [round(lr_factor(s, 10, schedule), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    final = schedule.final
    rise = math.ceil(total * schedule.warmup)
    if step < rise:
        return (step + 1) / rise
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        done = (step - rise) / max(1, total - rise)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    fall = max(1, round(total * schedule.warmdown))
    left = total - step
    return 1.0 if left >= fall else final + (1 - final) * left / fall
