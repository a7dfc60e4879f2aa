"""Weights in the layout that the CPU's matrix kernels want, made once and not at every product.

Generation multiplies few rows by every weight, at every token. torch hands the weight as it is to a kernel that puts it
in order again each time; oneDNN takes one that is in order already: 1.5 to 2.7 times as fast for 32 rows of a model 576
wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sftflow.foundation.runtime import free_memory

SPARE = 4
"""the copies may take one in so many bytes of the memory that is free"""
TOLERANCE = 1e-4


Forwards = list[tuple[torch.nn.Module, Callable[..., Any]]]


def ordered_forwards(model: Any) -> Forwards:
    """The model's linear layers, each with the function that computes it from a copy of its weight in oneDNN's order.

    Empty where that cannot be had or does not pay: it takes fp32 on a CPU whose torch has oneDNN, and memory to spare.
    The model's own weights stay as they are; whoever changes them makes new copies.
    """
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    if not layers or any(m.weight.device.type != "cpu" or m.weight.dtype != torch.float32 for m in layers):
        return []
    if not torch.backends.mkldnn.is_available() or 4 * sum(m.weight.numel() for m in layers) * SPARE > free_memory():
        return []
    try:
        return [(m, _forward(m)) for m in layers] if _agrees(min(layers, key=lambda m: m.weight.numel())) else []
    except (AttributeError, RuntimeError, TypeError):  # not a public operation of torch: it may change, or be missing
        return []


@torch.inference_mode()
def _forward(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = multiply(x, weight, layer.bias, "none", [], "")
        return out

    return forward


@torch.inference_mode()
def _agrees(layer: torch.nn.Linear) -> bool:
    """Whether the operation does here what we take it for."""
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    wanted = F.linear(x, layer.weight, layer.bias)
    gap = (_forward(layer)(x) - wanted).abs().max()
    return float(gap) <= TOLERANCE * max(1.0, float(wanted.abs().max()))
