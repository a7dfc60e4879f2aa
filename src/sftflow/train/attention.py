"""Isolation of packed conversations, on any backend, through transformers' attention interface.

Packed rows are computed as they are everywhere except inside attention. There, each conversation is gathered
out of its row into a right-padded batch of conversations of similar length, where plain causal attention
needs no mask: a query never looks to its right, so the padding on the right is never seen.

    row   a a a b b .      ->  gathered  a a a        ->  scattered back   a' a' a' b' b' 0
                                         b b .
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

NAME = "sftflow_packed"
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Bucket:
    """Conversations of similar length: `index` (n, width) points into the flattened batch (rows * length);
    `valid` lists the positions of the flattened (n * width) that hold a token, `target` where each goes back."""

    index: torch.Tensor
    valid: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where the conversations of a batch lie; None stands for "every row is one whole conversation"."""

    buckets: tuple[Bucket, ...]


def _width(n: int) -> int:
    for width in BUCKETS:
        if n <= width:
            return width
    return -(-n // 256) * 256


def layout_of(segments: NDArray[np.int64], device: torch.device | str = "cpu") -> Layout | None:
    """The layout of a batch from its `segments` of shape (rows, length), once per batch and not per layer."""
    rows, length = segments.shape
    if (segments == 1).all():
        return None
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    flat = segments.ravel()
    change = np.flatnonzero(np.diff(flat) != 0) + 1
    edges = np.unique(np.concatenate([[0], change, np.arange(1, rows) * length, [flat.size]]))
    for start, end in pairwise(edges.tolist()):
        if flat[start] > 0:
            spans[min(_width(end - start), length)].append((start, end))
    buckets = []
    for width, items in sorted(spans.items()):
        starts = np.array([s for s, _ in items])[:, None]
        sizes = np.array([e - s for s, e in items])[:, None]
        offset = np.arange(width)[None, :]
        real = offset < sizes
        index = np.where(real, starts + offset, starts)  # padding repeats the first token and is dropped again
        valid = np.flatnonzero(real.ravel())
        buckets.append(
            Bucket(
                index=torch.from_numpy(index).to(device),
                valid=torch.from_numpy(valid).to(device),
                target=torch.from_numpy(index.ravel()[valid]).to(device),
            )
        )
    return Layout(tuple(buckets))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of (n, heads, width, size); optional sliding window and logit soft-capping (Gemma 2)."""
    width = q.shape[2]
    if softcap is None and (window is None or width <= window):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    reach = torch.arange(width, device=q.device)
    distance = reach[:, None] - reach[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).float().softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (rows, heads, length, size) -> (rows, length, heads, size)."""
    options: dict[str, Any] = dict(scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap)
    if layout is None:
        return _attend(query, key, value, **options).transpose(1, 2).contiguous(), None
    rows, heads, length, size = query.shape

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(rows * length, -1)

    q, k, v = flat(query), flat(key), flat(value)
    out = query.new_zeros(rows * length, heads * value.shape[-1])
    for bucket in layout.buckets:
        n, width = bucket.index.shape

        def gather(x: torch.Tensor, bucket: Bucket = bucket, n: int = n, width: int = width) -> torch.Tensor:
            return x.index_select(0, bucket.index.view(-1)).view(n, width, -1, size).transpose(1, 2)

        attended = _attend(gather(q), gather(k), gather(v), **options)
        attended = attended.transpose(1, 2).reshape(n * width, -1)
        out = out.index_copy(0, bucket.target, attended.index_select(0, bucket.valid).to(out.dtype))
    return out.view(rows, length, heads, -1), None


def use_packed_attention(model: Any) -> None:
    """Make `model` (a transformers causal LM) attend through `packed_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
