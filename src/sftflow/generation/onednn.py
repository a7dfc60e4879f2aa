"""Weights in the order that the CPU's matrix kernels want, made once and not at every product.

Generation multiplies few rows by every weight, at every token. A weight as the checkpoint has it, (out, in), is put in
order again by every product of more than a few rows. A copy spares that. Which one is faster hangs on the shape
(measured for 1 to 256 rows of widths 192 and 576, see docs/performance.md):

    (in, out) row by row     all but the largest weights
    oneDNN's own order       weights of LARGE numbers or more; a single row takes the weight as it is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sftflow.foundation.runtime import free_memory

SPARE = 4
"""the copies may take one in so many bytes of the memory that is free"""
TOLERANCE = 1e-4
LARGE = 1 << 22
"""numbers of a weight from which oneDNN's order is the faster for several rows"""

Forwards = list[tuple[torch.nn.Module, Callable[..., Any]]]
Layers = Sequence[torch.nn.Linear]
Product = Callable[[torch.Tensor], torch.Tensor]
"""(rows, in) -> (rows, out)"""


def may_order(model: Any) -> bool:
    """Whether copies in another order can be had: of fp32 weights on a CPU, with memory to spare."""
    layers = linear_layers(model)
    if not layers or any(m.weight.device.type != "cpu" or m.weight.dtype != torch.float32 for m in layers):
        return False
    return 4 * sum(m.weight.numel() for m in layers) * SPARE <= free_memory()


def ordered_forwards(model: Any) -> Forwards:
    """The model's linear layers, each with the function that computes it from a copy of its weight; [] unless
    `may_order`. The model's own weights stay as they are; whoever changes them makes new copies."""
    return [(m, forward_by(product(m))) for m in linear_layers(model)] if may_order(model) else []


def linear_layers(model: Any) -> list[torch.nn.Linear]:
    return [m for m in model.modules() if type(m) is torch.nn.Linear]


def forward_by(multiply: Product) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer's forward for inputs of any shape (..., in)."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    return forward


@torch.inference_mode()
def transposed(layers: Layers) -> torch.Tensor:
    """The layers' weights side by side: (in, out of all)."""
    return torch.cat([layer.weight for layer in layers]).t().contiguous()


def times(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """weight: (in, out), rows of which may be parts of longer ones."""
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def product(layer: torch.nn.Linear) -> Product:
    """What multiplies rows by this layer's weight, and adds its bias, by the copy that its size asks for."""
    if layer.weight.numel() < LARGE:
        return times(transposed([layer]), layer.bias)
    return _by_onednn(layer) or (lambda x: F.linear(x, layer.weight, layer.bias))


@torch.inference_mode()
def _by_onednn(layer: torch.nn.Linear) -> Product | None:
    """None where the operation is missing or does something else: it is not a public one of torch."""
    if not torch.backends.mkldnn.is_available():
        return None
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    try:
        many = torch.ops.mkldnn._linear_pointwise
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32)
        found = many(x, weight, layer.bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    wanted = F.linear(x, layer.weight, layer.bias)
    if float((found - wanted).abs().max()) > TOLERANCE * max(1.0, float(wanted.abs().max())):
        return None

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return F.linear(x, layer.weight, layer.bias)
        out: torch.Tensor = many(x, weight, layer.bias, "none", [], "")
        return out

    return multiply
