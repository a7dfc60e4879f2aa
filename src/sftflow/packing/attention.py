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
from typing import Any, Literal, NamedTuple

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
        out = _Gathered(layout, "queries", query, key.shape[1], value.shape[2])
        keys = _Gathered(layout, "keys", key, key.shape[1])
        for number, bucket in enumerate(layout.buckets):
            q, k, v = out.of(query, number), keys.of(key, number), keys.of(value, number)
            weights, _ = _weights(q, k, bucket, how)
            out.put(number, weights.to(v.dtype), v)
        return out.back().view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        kv_heads, dtype, scale = key.shape[1], query.dtype, ctx.how.scale
        grad = grads[0].to(dtype)
        d_query = _Gathered(ctx.layout, "queries", query, kv_heads)
        d_key, d_value = (_Gathered(ctx.layout, "keys", x, kv_heads) for x in (key, value))
        for number, bucket in enumerate(ctx.layout.buckets):
            q, g = (d_query.of(x, number) for x in (query, grad))
            k, v = (d_key.of(x, number) for x in (key, value))
            weights, slope = _weights(q, k, bucket, ctx.how)
            d_weights = torch.bmm(g, v.transpose(1, 2)).float()
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = d_scores.to(dtype)
            d_value.put(number, weights.to(dtype).transpose(1, 2), g)
            d_key.put(number, d_scores.transpose(1, 2), q, scale)
            d_query.put(number, d_scores, k, scale)
        shaped = (d_query.back().view_as(query), d_key.back().view_as(key), d_value.back().view_as(value))
        return *shaped, None, None


class _Gathered:
    """What is computed of each bucket's queries or keys, bucket after bucket, on its way back into the row.

    like: (slots, heads, size) what they are gathered out of; size: of what is computed, where that differs.
    """

    def __init__(
        self, layout: Layout, of: Literal["queries", "keys"], like: torch.Tensor, kv_heads: int, size: int | None = None
    ) -> None:
        slots, heads = like.shape[:2]
        self.rows, self.dtype = layout.rows(of, slots, heads, kv_heads), like.dtype
        self.n = [len(getattr(bucket, of)) * kv_heads for bucket in layout.buckets]
        sizes = [len(taken) for taken in self.rows.taken]
        summed = torch.float32 if len(self.rows.again) else like.dtype
        self.whole = like.new_empty(sum(sizes) + 1, size or like.shape[2], dtype=summed)
        self.whole[-1] = 0
        self.parts = self.whole[:-1].split(sizes)

    def of(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """(slots, heads, size) -> (n * kv_heads, group * width, size) of this bucket."""
        taken = x.reshape(-1, x.shape[2]).index_select(0, self.rows.taken[number])
        return taken.view(self.n[number], -1, x.shape[2])

    def put(self, number: int, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
        """scale * left @ right is what this bucket has computed."""
        out = self.parts[number].view(self.n[number], -1, right.shape[2])
        if out.dtype == right.dtype:
            out.baddbmm_(left, right, beta=0, alpha=scale)
        else:
            out.copy_(torch.bmm(left, right)).mul_(scale)

    def back(self) -> torch.Tensor:
        """(slots * heads, size) in the row's order; the sum where several hold a slot, 0 where none does."""
        out = self.whole.index_select(0, self.rows.back)
        if len(self.rows.again):
            out.index_add_(0, self.rows.into, self.whole.index_select(0, self.rows.again))
        return out.to(self.dtype)


def _weights(
    q: torch.Tensor, k: torch.Tensor, bucket: Bucket, how: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n * kv_heads, group * wq, wk) attention weights in fp32, and the soft-cap's slope."""
    mask = bucket.mask(how.window, torch.float32)[:, None, None]
    (n, wide_q), wide_k = bucket.queries.shape, bucket.keys.shape[1]
    scores = torch.empty(len(q), q.shape[1], wide_k)
    spread = scores.view(n, -1, q.shape[1] // wide_q, wide_q, wide_k)
    q, k = q.float(), k.float().transpose(1, 2)
    if how.softcap is None:
        spread.copy_(mask)
        return torch.softmax(scores.baddbmm_(q, k, alpha=how.scale), -1), None
    scores = torch.tanh_(scores.baddbmm_(q, k, beta=0, alpha=how.scale / how.softcap))
    slope = 1 - scores * scores
    scores.mul_(how.softcap)
    spread.add_(mask)
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
