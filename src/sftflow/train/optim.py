"""Optimizers and learning-rate schedules.

A new optimizer is one function in `OPTIMIZERS`: named parameters in, a list of torch optimizers out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Named = list[tuple[str, torch.nn.Parameter]]

# Muon moves matrices by orthogonalised steps whose size does not depend on the gradient, so its learning rate
# is a fixed multiple of AdamW's in one recipe; `lr` is always AdamW's for the embeddings, norms and biases.
MUON_RATIO = 4.0


def _is_matrix(name: str, p: torch.nn.Parameter, heads: set[int]) -> bool:
    return p.ndim == 2 and id(p) not in heads


def _adamw_groups(named: Named, heads: set[int], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms, biases and embeddings (Loshchilov and Hutter 2019, as practised)."""
    decayed = [p for n, p in named if _is_matrix(n, p, heads)]
    rest = [p for n, p in named if not _is_matrix(n, p, heads)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def adamw(named: Named, heads: set[int], lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    groups = _adamw_groups(named, heads, weight_decay)
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]


def muon(named: Named, heads: set[int], lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for n, p in named if _is_matrix(n, p, heads)]
    rest = [(n, p) for n, p in named if not _is_matrix(n, p, heads)]
    out: list[torch.optim.Optimizer] = []
    if matrices:
        out.append(
            torch.optim.Muon(matrices, lr=lr * MUON_RATIO, weight_decay=weight_decay, momentum=0.95, nesterov=True)
        )
    if rest:
        out.extend(adamw(rest, heads, lr, 0.0))
    return out


OPTIMIZERS: dict[str, Callable[[Named, set[int], float, float], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


def make_optimizers(model: torch.nn.Module, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters; each group remembers its peak rate as `peak_lr`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    heads: set[int] = set()
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if embedding is not None:
            heads.update(id(p) for p in embedding.parameters())
    optimizers = OPTIMIZERS[name](named, heads, lr, weight_decay)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, total: int, *, kind: str, warmup: float, warmdown: float, final: float) -> float:
    """The share of the peak learning rate at `step` (0-based) of `total`.

    linear: rise over the first `warmup` share, hold, fall in a straight line to `final` over the last `warmdown`.
    cosine: rise, then half a cosine to `final`.   constant: rise, then hold.

    >>> [round(lr_factor(s, 10, kind="linear", warmup=0.2, warmdown=0.5, final=0.0), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    rise = math.ceil(total * warmup)
    if step < rise:
        return (step + 1) / rise
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        done = (step - rise) / max(1, total - rise)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    fall = max(1, round(total * warmdown))
    left = total - step
    return 1.0 if left >= fall else final + (1 - final) * left / fall
