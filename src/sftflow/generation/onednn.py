"""Weights in the layout that the CPU's matrix kernels want, made once and not at every product.

Generation multiplies few rows by every weight, at every token. torch hands the weight as it is to a kernel that puts it
in order again each time; oneDNN takes one that is in order already: 1.5 to 2.7 times as fast for 32 rows of a model 576
wide.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sftflow.runtime import free_memory

SPARE = 4
"""the copies may take one in so many bytes of the memory that is free"""
TOLERANCE = 1e-4


class OrderedWeights:
    """Copies of a model's linear weights in oneDNN's order; `use` and `stop` switch the model's layers over.

    The model's own weights stay as they are. Whoever changes them makes new copies.
    """

    def __init__(self, model: Any) -> None:
        self._layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
        with torch.inference_mode():
            ordered = [torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), 32) for m in self._layers]
        self._forwards = [_forward(w, m.bias) for m, w in zip(self._layers, ordered, strict=True)]

    def use(self) -> None:
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.forward = forward

    def stop(self) -> None:
        for layer in self._layers:
            layer.__dict__.pop("forward", None)


def _forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: torch.Tensor) -> torch.Tensor:
        return multiply(x, weight, bias, "none", [], "")

    return forward


def ordered_weights(model: Any) -> OrderedWeights | None:
    """The copies, where they can be had and pay: fp32 on a CPU whose torch has oneDNN, and memory to spare."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    if not layers or any(m.weight.device.type != "cpu" or m.weight.dtype != torch.float32 for m in layers):
        return None
    if not torch.backends.mkldnn.is_available() or 4 * sum(m.weight.numel() for m in layers) * SPARE > free_memory():
        return None
    try:
        return OrderedWeights(model) if _agrees(min(layers, key=lambda m: m.weight.numel())) else None
    except (AttributeError, RuntimeError, TypeError):  # not a public operation of torch: it may change, or be missing
        return None


@torch.inference_mode()
def _agrees(layer: Any) -> bool:
    """Whether the operation does here what we take it for."""
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    wanted = F.linear(x, layer.weight, layer.bias)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32)
    gap = (_forward(weight, layer.bias)(x) - wanted).abs().max()
    return float(gap) <= TOLERANCE * max(1.0, float(wanted.abs().max()))
