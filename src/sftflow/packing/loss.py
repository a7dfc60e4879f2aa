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

from sftflow.foundation.runtime import Runtime
from sftflow.packing.attending import Mode, attending
from sftflow.packing.layout import layout_of
from sftflow.packing.pack import PackedBatch
from sftflow.packing.token_rows import TokenRows, is_plain, token_rows

LOGITS = 1 << 24
"""logits in a chunk: large enough for efficient products, small beside weights and activations"""
BLOCK = 1 << 17
"""logits in fp32 at a time, where nothing fuses the passes over them"""
ROWS = 8192
"""rows of the head whose gradient is made at a time"""

Parts = Callable[
    [torch.Tensor, torch.Tensor, "float | None", float, "torch.dtype | None", "torch.Tensor | None"],
    tuple[torch.Tensor, "torch.Tensor | None"],
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's output projection: logits = cap * tanh(scale * (h W^T + b) / cap).

    weight: (vocabulary, width).   bias: (vocabulary,).   softcap: Gemma 2's.   scale: Cohere's, Granite's.
    bf16: the copy of the weight that products run on, where it is not simply rounded.
    grad: where the weight's gradient is added, if not to its own `.grad`.   rows: those of a frozen weight that are
    trained by themselves.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    bf16: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    rows: TokenRows | None = None


def head_of(model: Any, bf16: torch.Tensor | None = None) -> Head:
    """The head of a transformers causal LM; `prove_forward` checks that it is all of it."""
    layer, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    rows = token_rows(layer)
    return Head(
        weight=layer.weight if rows is None else rows.weight,
        rows=rows,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale,
        bf16=bf16,
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
    dtype: torch.dtype | None,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """((n,) losses in fp32, (n, vocabulary) gradient of their sum by the raw logits in `dtype`; None: no gradient).

    loss = logsumexp(z) - z[target],  d loss / dz = softmax(z) - onehot(target),  z = cap(scale * logits).
    weights: (n,) fp32, what each loss is multiplied by in that sum; None: 1. (Here, before the gradient is rounded.)
    In place, in the logits themselves, a few rows at a time, so that they stay in the processor's cache.
    """
    losses = torch.empty(len(targets), device=logits.device)
    grad = None if dtype is None else logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    rows = max(1, BLOCK // logits.shape[1])
    for start in range(0, len(targets), rows):
        z = logits[start : start + rows].float()
        t = targets[start : start + rows, None]
        slope = None
        if scale != 1:
            z.mul_(scale)
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1 - z * z
            z.mul_(softcap)
        top, wanted = z.amax(-1, keepdim=True), z.gather(1, t)
        total = z.sub_(top).exp_().sum(-1, keepdim=True)
        losses[start : start + rows] = (total.log() + top - wanted).squeeze(1)
        if grad is not None:
            z.div_(total).scatter_add_(1, t, torch.full_like(total, -1.0))
            if weights is not None:
                z.mul_(weights[start : start + rows, None])
            if slope is not None:
                z.mul_(slope)
            if scale != 1:
                z.mul_(scale)
            if grad is not logits or z.dtype != logits.dtype:
                grad[start : start + rows] = z
    return losses, grad


def fused_parts(
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype | None,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`loss_parts` without a loop or anything in place: what a compiler makes one pass of."""
    z = logits.float() * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    lse = torch.logsumexp(z, -1)
    losses = lse - z.gather(1, targets[:, None]).squeeze(1)
    if dtype is None:
        return losses, None
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    grad = torch.exp(z - lse[:, None]) - is_target.float()
    if softcap is not None:
        grad = grad * (1 - (z / softcap) ** 2)
    if weights is not None:
        grad = grad * weights[:, None]
    return losses, (grad * scale).to(dtype)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    parts: Parts = loss_parts,
    scale: float | None = None,
) -> torch.Tensor:
    """(n,) losses -log softmax(head(hidden))[target]; with `scale`, also the gradient of scale * their sum.

    hidden: (n, width) at supervised positions.   targets: (n,).   weights: (n,) fp32, of each loss in that sum (those
    returned have none).   parts: `loss_parts`, or `fused_parts` compiled.
    The products run in `dtype` (default: hidden's), the softmax in fp32. The gradient is computed chunk by chunk beside
    the loss: the head's is added to its `.grad`, that of the hidden states goes on backward through the model from
    here. Nothing of the size of the head is allocated but its gradient in `dtype`.
    """
    dtype = dtype or hidden.dtype
    with torch.no_grad():
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = None if scale is None else torch.empty_like(hidden)
        weight = (head.weight if head.bf16 is None else head.bf16).to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        d_weight, d_bias = (None if scale is None else _grad_of(p) for p in (head.weight, head.bias))
        d_weight = d_weight if head.grad is None else head.grad
        d_rows = None if scale is None or head.rows is None else _grad_of(head.rows.rows)
        chunk = max(128, LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk].to(dtype)
            t = targets[start : start + chunk]
            logits = F.linear(h, weight, bias)
            w = None if weights is None else weights[start : start + chunk]
            mine, grad = parts(logits, t, head.softcap, head.scale, None if scale is None else dtype, w)
            losses[start : start + chunk] = mine
            if grad is None or d_hidden is None or scale is None:
                continue
            d_hidden[start : start + chunk] = (grad @ weight).mul_(scale)
            if d_weight is not None:
                if d_weight.dtype == h.dtype:
                    d_weight.addmm_(grad.T, h, alpha=scale)
                else:
                    for v in range(0, d_weight.shape[0], ROWS):  # a sum of two dtypes makes a copy of its size
                        d_weight[v : v + ROWS].add_(grad[:, v : v + ROWS].T @ h, alpha=scale)
            if d_rows is not None and head.rows is not None:
                d_rows.add_(grad[:, head.rows.at].T @ h, alpha=scale)
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=torch.float32), alpha=scale)
    if d_hidden is not None and hidden.requires_grad:
        hidden.backward(d_hidden)
    return losses


def _grad_of(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The parameter's gradient, made where it is not there; None for a frozen parameter."""
    if parameter is None or not parameter.requires_grad:
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def body_of(model: Any) -> Any:
    """All of a model but its output projection."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def needs_previous_ids(model: Any) -> bool:
    """Whether a model must be told the token before each: it looks back at that one by itself, besides attention."""
    return bool(getattr(model, "needs_previous_ids", False))


def hidden_states(model: Any, batch: PackedBatch, *, packed: bool = True) -> torch.Tensor:
    """The last hidden states, (slots, width), before the output projection.

    packed: through `packed_attention`; else the rows are plain sequences, right-padded, for the model's own forward.
    """
    ids = torch.from_numpy(batch.input_ids).to(model.device)
    extra: dict[str, Any] = {}
    if packed:
        positions = torch.from_numpy(batch.positions).to(model.device)
        extra = {"position_ids": positions, "layout": layout_of(batch, model.device)}
        if needs_previous_ids(model):
            extra["previous_ids"] = torch.from_numpy(batch.previous_ids()).to(model.device)
    out: torch.Tensor = body_of(model)(input_ids=ids, use_cache=False, **extra).last_hidden_state
    return out.reshape(-1, out.shape[-1])


def batch_loss(
    model: Any,
    batch: PackedBatch,
    runtime: Runtime,
    *,
    packed: bool = True,
    parts: Parts = loss_parts,
    scale: float | None = None,
    head: Head | None = None,
) -> torch.Tensor:
    """(n,) loss per supervised token (`batch.sources` tells their sources), without gradient and weight.

    scale: also add the gradient of scale * their sum, each times its weight, to the parameters' `.grad`.   The model is
    left as it was found.
    """
    targets = torch.from_numpy(batch.labels).to(model.device)
    weights = None if batch.weights is None else torch.from_numpy(batch.weights).float().to(model.device)
    dtype = torch.bfloat16 if runtime.precision == "bf16" else None
    rows = token_rows(model.get_input_embeddings())
    forwards = [] if rows is None or not is_plain(rows) else [(rows.wrapper, rows.embed)]
    mode: Mode = "packed" if packed else "own"
    with attending(model, mode, forwards=forwards, sparse_embedding=scale is not None, few_passes=True):
        with runtime.autocast(), torch.set_grad_enabled(scale is not None):
            hidden = hidden_states(model, batch, packed=packed)
            wanted = hidden.index_select(0, torch.from_numpy(batch.label_positions).to(model.device))
        head = head or head_of(model)
        return chunked_cross_entropy(wanted, head, targets, weights=weights, dtype=dtype, parts=parts, scale=scale)
