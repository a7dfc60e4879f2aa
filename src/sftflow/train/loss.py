"""Cross-entropy at supervised positions only, in chunks fused with the output projection.

The logits of a chunk live only while its loss and gradients are computed, so memory is
O(chunk * vocabulary) and not O(tokens * vocabulary).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 1024


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token losses' sum, with the gradients of hidden states and head computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        compute_dtype: torch.dtype,
        per_token: torch.Tensor,
    ) -> torch.Tensor:
        need_grad = hidden.requires_grad or weight.requires_grad
        w = weight.to(compute_dtype)
        d_hidden = torch.empty_like(hidden) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_grad and bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            h = hidden[start : start + CHUNK].to(compute_dtype)
            t = targets[start : start + CHUNK]
            logits = (F.linear(h, w, None if bias is None else bias.to(compute_dtype))).float()
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            lse = torch.logsumexp(logits, -1)
            losses = lse - logits.gather(1, t[:, None]).squeeze(1)
            per_token[start : start + CHUNK] = losses
            total += losses.sum()
            if d_hidden is None or d_weight is None:
                continue
            slope = (1 - (logits / softcap) ** 2) if softcap is not None else None
            grad = logits.sub_(lse[:, None]).exp_()
            grad.scatter_add_(1, t[:, None], grad.new_full((len(t), 1), -1.0))
            if slope is not None:
                grad.mul_(slope)
            if d_bias is not None:
                d_bias += grad.sum(0)
            g = grad.to(compute_dtype)
            d_hidden[start : start + CHUNK] = (g @ w).to(d_hidden.dtype)
            d_weight += (g.T @ h).float()
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad,) = grad_outputs
        d_hidden, d_weight, d_bias = ctx.grads
        ctx.grads = None
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            d_hidden * grad.to(d_hidden.dtype),
            (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over n tokens of -log softmax(hidden @ weight.T)[target], and the (n,) losses for logging.

    hidden: (n, width) at supervised positions.   weight: (vocabulary, width).   targets: (n,).
    The products run in `compute_dtype` (default: hidden's), the softmax in fp32. No gradient flows into the
    per-token losses.
    """
    per_token = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    total: torch.Tensor = _ChunkedCrossEntropy.apply(
        hidden, weight, bias, targets, softcap, compute_dtype or hidden.dtype, per_token
    )
    return total, per_token
