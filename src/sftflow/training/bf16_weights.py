"""Working weights: the bf16 copies that matrix products run on, while the optimizer moves the weights in fp32.

Autocast would round each weight to nearest in every forward pass; here it is rounded once a step, and so that small
updates are not lost (see `sftflow.rounding`). Gradients go straight to the fp32 weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from sftflow.rounding import round_bf16
from sftflow.training.compile import decoder_layers


class _Straight(torch.autograd.Function):
    """The working copy in place of the weight, the weight's gradient in its own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, working: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return working.view_as(working)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].float(), None


def _bias(module: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if module.bias is None else module.bias.to(dtype)


class WorkingLinear(torch.nn.Linear):
    """nn.Linear on its working weights."""

    working: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = _Straight.apply(self.weight, self.working)
        return F.linear(input.to(weight.dtype), weight, _bias(self, weight.dtype))


class WorkingConv1D(Conv1D):
    """GPT-2's transposed linear layer on its working weights."""

    working: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _Straight.apply(self.weight, self.working)
        return F.linear(x.to(weight.dtype), weight.T, _bias(self, weight.dtype))


CLASSES = {torch.nn.Linear: WorkingLinear, Conv1D: WorkingConv1D}


def release(model: Any) -> None:
    """Make a model that was trained on working weights an ordinary one again."""
    plain = {working: ordinary for ordinary, working in CLASSES.items()}
    modules: list[Any] = [m for m in model.modules() if type(m) in plain]
    for module in modules:
        module.__class__ = plain[type(module)]
        del module.working


class WorkingWeights:
    """The working weights of a model's decoder layers and output projection. `refresh` after every change."""

    def __init__(self, model: Any) -> None:
        self.modules: list[Any] = []
        for layer in decoder_layers(model):
            for module in layer.modules():
                if type(module) in CLASSES:
                    module.register_buffer("working", module.weight.detach().to(torch.bfloat16), persistent=False)
                    module.__class__ = CLASSES[type(module)]
                    self.modules.append(module)
        self.head_weight = model.get_output_embeddings().weight
        self.head = self.head_weight.detach().to(torch.bfloat16)
        self.refresh(every=True)

    @torch.no_grad()
    def refresh(self, every: bool = False) -> None:
        """Round the trained weights anew (`every`: the frozen ones too)."""
        for module in self.modules:
            if every or module.weight.requires_grad:
                round_bf16(module.weight, module.working)
        if every or self.head_weight.requires_grad:
            round_bf16(self.head_weight, self.head)
