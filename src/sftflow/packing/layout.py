"""Where the conversations of a packed batch lie, as index tensors, made once per batch and not per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sftflow.packing.pack import PackedBatch

# Conversations are gathered into rectangles of these widths, so that the same kernels and memory blocks serve again.
WIDTHS = (*range(16, 128, 16), *range(128, 256, 32), 256, 320, 384, 448, 512, 640, 768, 1024)


def width_for(n: int) -> int:
    """The rectangle width for n tokens."""
    return next((w for w in WIDTHS if n <= w), -(-n // 1024) * 1024)


def causal_mask(reach: torch.Tensor, wide: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(..., wide) zero where a query that has `reach` (...) keys before it sees a key, itself the last one, else -inf.

    window: it sees no more than so many; None: all.
    """
    distance = reach[..., None] - torch.arange(wide, device=reach.device)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return torch.zeros(seen.shape, dtype=dtype, device=reach.device).masked_fill_(~seen, float("-inf"))


@dataclass(frozen=True)
class Bucket:
    """Conversations of similar length, n of them.

    queries: (n, wq) the slots that are a conversation's own.   keys: (n, wk) all its slots, shared ones too.
    reach: (n, wq) how many keys lie before each query, itself not counted.   Filling points at the free slot, whose
    state nobody reads.   aligned: every query i has reach i (nothing is shared), so plain causal masking does.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    reach: torch.Tensor
    aligned: bool

    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(n or 1, wq, wk) zero where a query sees a key, else -inf; made once, every layer asks for it."""
        if (window, dtype) not in self._masks:
            wide_q, wide_k = self.queries.shape[1], self.keys.shape[1]
            reach = torch.arange(wide_q, device=self.keys.device)[None] if self.aligned else self.reach
            self._masks[window, dtype] = causal_mask(reach, wide_k, window, dtype)
        return self._masks[window, dtype]


class Rows(NamedTuple):
    """Where the heads' vectors of a batch lie, for gathering and for the way back.

    taken: of each bucket (n * kv_heads * group * width,) rows of a (slots * heads, size) tensor, the queries of heads
    that share keys side by side; all buckets on end are the gathered rows.   back: (slots * heads,) the gathered row
    that each came to, the number of gathered rows where to none.   again, into: the gathered rows that hold a vector
    once more (of a shared beginning), and its row in the tensor.
    """

    taken: list[torch.Tensor]
    back: torch.Tensor
    again: torch.Tensor
    into: torch.Tensor


def rows_of(slots: Sequence[torch.Tensor], n_slots: int, heads: int, kv_heads: int) -> Rows:
    """slots: of each bucket (n, width) the slots that are gathered, filling at the last one, which is not."""
    head = np.arange(heads).reshape(1, kv_heads, -1, 1)
    taken = [(s.numpy()[:, None, None] * heads + head).ravel() for s in slots]
    every = np.concatenate(taken)
    back = np.full(n_slots * heads, len(every))
    given = np.flatnonzero(every < (n_slots - 1) * heads)
    back[every[given]] = given
    again = given[back[every[given]] != given]
    return Rows([torch.from_numpy(t) for t in taken], *(torch.from_numpy(x) for x in (back, again, every[again])))


@dataclass(frozen=True)
class Layout:
    """All buckets of a batch, and for variable-length kernels: paths: the keys' slots of all conversations on end;
    starts_q and starts_k: where each conversation begins in the row and in `paths`, (n + 1,) int32; n_computed: slots
    of the row that hold a token."""

    buckets: tuple[Bucket, ...]
    paths: torch.Tensor
    starts_q: torch.Tensor
    starts_k: torch.Tensor
    longest_q: int
    longest_k: int
    n_computed: int

    _rows: dict[Any, Rows] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, of: Literal["queries", "keys"], n_slots: int, heads: int, kv_heads: int) -> Rows:
        """The rows of all buckets' queries or keys in a tensor of (n_slots * heads, size) on the CPU; made once."""
        known = of, n_slots, heads, kv_heads
        if known not in self._rows:
            self._rows[known] = rows_of([getattr(b, of) for b in self.buckets], n_slots, heads, kv_heads)
        return self._rows[known]


def layout_of(batch: PackedBatch, device: torch.device | str = "cpu", n_shared: int = 0) -> Layout:
    """The layout of a packed batch (one row; see `pack_batch`).

    n_shared: keys that stand before the row's own and begin every conversation; their queries are not in the row.
    """
    free = batch.input_ids.size - 1
    before = np.arange(n_shared)
    paths = [np.concatenate([before, path + n_shared]) for path in batch.segments] if n_shared else batch.segments
    grouped: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (path, own) in enumerate(zip(paths, batch.n_own, strict=True)):
        if own:  # one that is wholly a beginning of another asks only at shared slots
            grouped[width_for(own), width_for(len(path))].append(number)
    buckets = []
    for (wide_q, wide_k), members in sorted(grouped.items()):
        queries = np.full((len(members), wide_q), free)
        keys = np.full((len(members), wide_k), free + n_shared)
        reach = np.zeros((len(members), wide_q), np.int64)
        for row, number in enumerate(members):
            path, own = paths[number], batch.n_own[number]
            queries[row, :own] = path[-own:] - n_shared
            keys[row, : len(path)] = path
            reach[row, :own] = np.arange(len(path) - own, len(path))
        aligned = all(batch.n_own[i] == len(paths[i]) for i in members)
        q, k, r = (torch.from_numpy(x).to(device) for x in (queries, keys, reach))
        buckets.append(Bucket(queries=q, keys=k, reach=r, aligned=aligned))
    given = [(p, o) for p, o in zip(paths, batch.n_own, strict=True) if o]
    starts = [np.cumsum([0, *x], dtype=np.int32) for x in ([o for _, o in given], [len(p) for p, _ in given])]
    return Layout(
        buckets=tuple(buckets),
        paths=torch.from_numpy(np.concatenate([p for p, _ in given])).to(device),
        starts_q=torch.from_numpy(starts[0]).to(device),
        starts_k=torch.from_numpy(starts[1]).to(device),
        longest_q=max(o for _, o in given),
        longest_k=max(len(p) for p, _ in given),
        n_computed=sum(o for _, o in given),
    )
