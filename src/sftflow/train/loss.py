"""Cross-entropy at supervised positions only, in chunks fused with the output projection.

The logits of a chunk live only while its loss and gradients are computed, so memory is
O(chunk * vocabulary) and not O(tokens * vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

LOGITS = 1 << 25
"""logits in a chunk: large enough for efficient products, small beside weights and activations"""

Parts = Callable[
    [torch.Tensor, torch.Tensor, "float | None", float, torch.dtype, bool], tuple[torch.Tensor, "torch.Tensor | None"]
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's output projection: logits = cap * tanh(scale * (h W^T + b) / cap).

    weight: (vocabulary, width).   bias: (vocabulary,).   softcap: Gemma 2's.   scale: Cohere's, Granite's.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


def head_of(model: Any) -> Head:
    """The head of a transformers causal LM; `prove_forward` checks that it is all of it."""
    layer, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale,
    )


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """(n, vocabulary) fp32 logits of (n, width) hidden states, by plain operations."""
    logits = F.linear(hidden, head.weight, head.bias).float() * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def loss_parts(
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """((n,) losses in fp32, (n, vocabulary) gradient of their sum by the raw logits in `dtype`).

    loss = logsumexp(z) - z[target],  d loss / dz = softmax(z) - onehot(target),  z = cap(scale * logits).
    """
    z = logits.float() * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    lse = torch.logsumexp(z, -1)
    losses = lse - z.gather(1, targets[:, None]).squeeze(1)
    if not with_grad:
        return losses, None
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    grad = torch.exp(z - lse[:, None]) - is_target.float()
    if softcap is not None:
        grad = grad * (1 - (z / softcap) ** 2)
    return losses, (grad * scale).to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token losses' sum, with the gradients of hidden states and head computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: Head,
        targets: torch.Tensor,
        dtype: torch.dtype,
        per_token: torch.Tensor,
        parts: Parts,
        need: bool,
    ) -> torch.Tensor:
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        d_hidden = torch.empty_like(hidden) if need else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need and weight.requires_grad else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need and bias is not None else None
        chunk = max(128, LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk].to(dtype)
            t = targets[start : start + chunk]
            losses, grad = parts(F.linear(h, w, b), t, head.softcap, head.scale, dtype, need)
            per_token[start : start + chunk] = losses
            if grad is None or d_hidden is None:
                continue
            if d_bias is not None:
                d_bias += grad.sum(0, dtype=torch.float32)
            d_hidden[start : start + chunk] = (grad @ w).to(d_hidden.dtype)
            if d_weight is not None:
                d_weight += grad.T @ h
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return per_token.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad,) = grad_outputs
        d_hidden, d_weight, d_bias = ctx.grads
        ctx.grads = None
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            d_hidden.mul_(grad.to(d_hidden.dtype)),
            None if d_weight is None else d_weight.mul_(grad).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(grad).to(bias_dtype),
            *(None,) * 6,
        )


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    parts: Parts = loss_parts,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over n tokens of -log softmax(head(hidden))[target], and the (n,) losses for logging.

    hidden: (n, width) at supervised positions.   targets: (n,).
    The products run in `dtype` (default: hidden's), the softmax in fp32. No gradient flows into the per-token
    losses. parts: `loss_parts`, or a compiled copy of it.
    """
    per_token = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    need = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    total: torch.Tensor = _ChunkedCrossEntropy.apply(
        hidden, head.weight, head.bias, head, targets, dtype or hidden.dtype, per_token, parts, need
    )
    return total, per_token
