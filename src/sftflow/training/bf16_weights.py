"""The bf16 copies of weights that matrix products run on, while the optimizer moves the weights themselves in fp32.

Autocast would round each weight to nearest in every forward pass; here it is rounded once a step, and so that small
updates are not lost (see `sftflow.foundation.rounding`). Gradients go straight to the fp32 weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from sftflow.foundation.rounding import round_bf16
from sftflow.packing.loss import head_of


class _StraightThrough(torch.autograd.Function):
    """The bf16 copy in place of the weight; its gradient is the weight's, in the weight's own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].float(), None


class OnCopy:
    """A linear layer computes on the bf16 copy of its weight; GPT-2's Conv1D keeps its weight transposed."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        weight = _StraightThrough.apply(self.weight, self.bf16)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.linear(input.to(weight.dtype), weight.T if isinstance(self, Conv1D) else weight, bias)


class Bf16Linear(OnCopy, torch.nn.Linear): ...


class Bf16Conv1D(OnCopy, Conv1D): ...


CLASSES = {torch.nn.Linear: Bf16Linear, Conv1D: Bf16Conv1D}


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The model's repeated blocks: its largest list of modules, [] where it has none."""
    lists = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    return [] if blocks is None else list(blocks)


def restore_classes(model: Any) -> None:
    """Make a model that was trained on bf16 copies an ordinary one again."""
    ordinary = {ours: theirs for theirs, ours in CLASSES.items()}
    modules: list[Any] = [m for m in model.modules() if type(m) in ordinary]
    for module in modules:
        module.__class__ = ordinary[type(module)]
        del module.bf16


@torch.no_grad()
def halve_frozen(model: Any) -> None:
    """Keep the weights of frozen linear layers in bf16 alone: they never move, and products run on that."""
    for module in (m for layer in decoder_layers(model) for m in layer.modules() if type(m) in CLASSES):
        if not module.weight.requires_grad:
            module.weight.data = round_bf16(module.weight)


class Bf16Weights:
    """The bf16 copies of a model's decoder layers and output projection. `refresh` after every change of a weight.

    Weights of which each rank has a part are rounded when they are gathered instead (see `sharding`).
    """

    def __init__(self, model: Any) -> None:
        self.modules: list[Any] = []
        for layer in decoder_layers(model):
            for module in layer.modules():
                kept = type(module) in CLASSES and module.weight.dtype == torch.float32
                if kept and not isinstance(module.weight, DTensor):
                    module.register_buffer("bf16", module.weight.detach().to(torch.bfloat16), persistent=False)
                    module.__class__ = CLASSES[type(module)]
                    self.modules.append(module)
        head = head_of(model)
        self.head_weight, self.head_changes = head.weight, head.weight.requires_grad or head.rows is not None
        gathered = isinstance(self.head_weight, DTensor)
        self.head = None if gathered else self.head_weight.detach().to(torch.bfloat16)
        self.refresh(every=True)

    @torch.no_grad()
    def refresh(self, every: bool = False) -> None:
        """Round the trained weights anew (`every`: the frozen ones too)."""
        for module in self.modules:
            if every or module.weight.requires_grad:
                round_bf16(module.weight, module.bf16)
        if self.head is not None and (every or self.head_changes):
            round_bf16(self.head_weight, self.head)
