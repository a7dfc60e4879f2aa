"""Isolation of packed conversations, on any backend, through transformers' attention interface.

A packed row is computed as it is everywhere except inside attention. There each conversation's keys are gathered out
of the row along its path (with the beginning that it shares with others), and its own queries attend to them causally:

    row   s s a a b b b d .      ->   queries  s s a a     keys  s s a a      ->  written back to the queries' slots
    paths (s s a a) (s s b b b)       of each  b b b       of    s s b b b
          (s s d)                     its own  d           each  s s d

Three ways, the same mathematics:

- `_Small`: rectangles multiplied by hand, with the backward pass in closed form. For short conversations on CPU, where
  torch's fused attention spends most of its time in the backward pass; also knows windows and soft-capped logits.
- torch's `scaled_dot_product_attention` over the same rectangles, for long ones and other devices.
- `torch.nn.attention.varlen` (FlashAttention) on CUDA in half precision, which needs no rectangles.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sftflow.packing.layout import Bucket, Layout

NAME = "sftflow_packed"
SMALL = 256
"""the widest keys that `_Small` takes: its scores are held whole"""


class Scoring(NamedTuple):
    """How a query's scores are made of its products with the keys: scale, then cap * tanh(score / cap) where `softcap`
    is given, then the softmax over the last `window` keys (None: all), then dropout of so large a share."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


def _gather(x: torch.Tensor, index: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(slots, heads, size) -> (n * kv_heads, group * width, size), the heads that share keys side by side."""
    n, width = index.shape
    heads, size = x.shape[1:]
    taken = x.reshape(len(x), -1).index_select(0, index.view(-1))
    grouped = taken.view(n, width, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return grouped.reshape(n * kv_heads, -1, size)


def _ungather(x: torch.Tensor, n: int, width: int, kv_heads: int) -> torch.Tensor:
    """The way back: (n * kv_heads, group * width, size) -> (n * width, heads * size)."""
    size = x.shape[-1]
    return x.view(n, kv_heads, -1, width, size).permute(0, 3, 1, 2, 4).reshape(n * width, -1)


class _Small(torch.autograd.Function):
    """Attention of all buckets by plain products; (slots, heads, size) in and out.

    P = softmax(mask + cap(scale * Q K^T)),  O = P V.  Backward (Dao et al. 2022, appendix B.4), P computed again:
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q;
    with soft-capping (cap * tanh(x / cap)) dS is also multiplied by 1 - (S / cap)^2.
    Scores are computed in fp32 also under bf16: their error would be multiplied by the exponential. Gradients of keys
    and values are summed in fp32, since a shared beginning collects those of every conversation.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        how: Scoring,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.how = layout, how
        kv_heads = key.shape[1]
        out = query.new_zeros(query.shape[0], query.shape[1] * value.shape[2])
        for bucket in layout.buckets:
            n, width = bucket.queries.shape
            q = _gather(query, bucket.queries, kv_heads)
            k, v = (_gather(x, bucket.keys, kv_heads) for x in (key, value))
            weights, _ = _weights(q, k, bucket, how)
            attended = torch.bmm(weights.to(v.dtype), v)
            out.index_copy_(0, bucket.queries.view(-1), _ungather(attended, n, width, kv_heads))
        return out.view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        kv_heads, dtype = key.shape[1], query.dtype
        grad = grads[0].to(dtype)
        d_query = query.new_zeros(query.shape[0], query[0].numel())
        d_key = torch.zeros(key.shape[0], key[0].numel(), device=key.device)
        d_value = torch.zeros(value.shape[0], value[0].numel(), device=key.device)
        for bucket in ctx.layout.buckets:
            n, width = bucket.queries.shape
            wide = bucket.keys.shape[1]
            q, g = (_gather(x, bucket.queries, kv_heads) for x in (query, grad))
            k, v = (_gather(x, bucket.keys, kv_heads) for x in (key, value))
            weights, slope = _weights(q, k, bucket, ctx.how)
            d_weights = torch.bmm(g, v.transpose(1, 2)).float()
            mean = (weights * d_weights).sum(-1, keepdim=True)
            d_scores = d_weights.sub_(mean).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = d_scores.mul_(ctx.how.scale).to(dtype)
            d_v = torch.bmm(weights.to(dtype).transpose(1, 2), g)
            d_k = torch.bmm(d_scores.transpose(1, 2), q)
            d_query.index_copy_(0, bucket.queries.view(-1), _ungather(torch.bmm(d_scores, k), n, width, kv_heads))
            for total, part in ((d_key, d_k), (d_value, d_v)):
                total.index_add_(0, bucket.keys.view(-1), _ungather(part, n, wide, kv_heads).float())
        shaped = (d_query.view_as(query), d_key.to(dtype).view_as(key), d_value.to(dtype).view_as(value))
        return *shaped, None, None


def _weights(
    q: torch.Tensor, k: torch.Tensor, bucket: Bucket, how: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n * kv_heads, group * wq, wk) attention weights in fp32, and the soft-cap's slope."""
    scores = torch.bmm(q.float() * how.scale, k.float().transpose(1, 2))
    slope = None
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap)
        slope = 1 - scores * scores
        scores = scores * how.softcap
    n, wide_q = bucket.queries.shape
    mask = bucket.mask(how.window, scores.dtype)[:, None, None]
    scores.view(n, -1, scores.shape[1] // wide_q, wide_q, scores.shape[2]).add_(mask)
    return torch.softmax(scores, -1), slope


def _rectangles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, how: Scoring
) -> torch.Tensor:
    """The same through torch's own attention over the gathered rectangles, by autograd."""
    scale, window, softcap, dropout = how
    out = query.new_zeros(query.shape[0], query.shape[1] * value.shape[2])
    for bucket in layout.buckets:

        def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            taken = x.reshape(len(x), -1).index_select(0, index.view(-1))
            return taken.view(*index.shape, *x.shape[1:]).transpose(1, 2)

        q, k, v = gather(query, bucket.queries), gather(key, bucket.keys), gather(value, bucket.keys)
        plain = bucket.aligned and q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
        mask = None if plain and softcap is None else bucket.mask(window, q.dtype)[:, None]
        if softcap is None:
            attended = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            scores = torch.tanh((q @ k.transpose(2, 3)).float() * scale / softcap) * softcap
            weights = (scores + mask).softmax(-1).to(q.dtype)
            attended = F.dropout(weights, dropout) @ v
        attended = attended.transpose(1, 2).reshape(bucket.queries.numel(), -1)
        out = out.index_copy(0, bucket.queries.view(-1), attended.to(out.dtype))
    return out.view(*query.shape[:2], -1)


@functools.cache
def _varlen() -> Any:
    """torch's FlashAttention over sequences of different length, where it knows windows and shared heads; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, how: Scoring) -> torch.Tensor:
    """The same by `_varlen`. Its causal mask is aligned at the end, so a conversation's own queries see the shared
    beginning among its keys."""
    n = layout.n_computed
    out: torch.Tensor = _varlen()(
        query[:n],
        key.index_select(0, layout.paths),
        value.index_select(0, layout.paths),
        layout.starts_q,
        layout.starts_k,
        layout.longest_q,
        layout.longest_k,
        scale=how.scale,
        window_size=(-1 if how.window is None else how.window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return F.pad(out, (0, 0, 0, 0, 0, len(query) - n))


def _can_flash(query: torch.Tensor, value: torch.Tensor, how: Scoring) -> bool:
    """Whether `_varlen` takes these: CUDA of capability 8.0 or more, half precision, sizes to 256."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    plain = how.softcap is None and how.dropout == 0
    return plain and _varlen() is not None and torch.cuda.get_device_capability(query.device) >= (8, 0)


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    plan: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (1, heads, slots, size) -> (1, slots, heads, size).

    layout: of the packed row.   plan: in its place, where keys and values are kept for further tokens: what of
    `generation.kv_cache` attends to them.
    """
    if layout is None and plan is None:
        raise ValueError("packed attention needs the batch's layout")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    how = Scoring(scale, sliding_window, softcap, dropout if module.training else 0.0)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does: rotary embedding leaves queries in fp32
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        if layout is not None:
            out = attend(q, k, v, layout, how)
        else:
            out = plan.attend(int(getattr(module, "layer_idx")), q, k, v, how).to(query.dtype)  # noqa: B009
    return out[None].contiguous(), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, how: Scoring) -> torch.Tensor:
    """Attention along the layout's paths, the fastest way that knows all that is asked.

    q: (slots, heads, size).   k, v: (slots of the keys, kv heads, size).   The result: (slots, heads, size).
    """
    longest = max(b.keys.shape[1] for b in layout.buckets)
    if _can_flash(q, v, how):
        return _flash(q, k, v, layout, how)
    if how.dropout == 0 and q.device.type == "cpu" and longest <= SMALL:
        small: torch.Tensor = _Small.apply(q, k, v, layout, how)
        return small
    return _rectangles(q, k, v, layout, how)
