"""Keys and values of running replies, and the attention that fills and reads them.

A layer's buffer is (rows, kv heads, room, size); row r holds `lengths[r]` tokens from place 0 on, so that no row is
padded and each may begin at any time. Rows that leave are closed up by moving the last ones into their places.

What stands before a row's own tokens (a beginning that all prompts have in common, or as much of one prompt as has been
read) is a `Prefix`. `Reading` and `Decoding` are the plans of one forward pass: `packed_attention` asks them, layer by
layer, to attend. Lengths are booked by `decoder`, once all layers have been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.packing.attention import Scoring, attend
from sftflow.packing.layout import Layout, causal_mask

ROOM = 128
"""places of a row come in multiples of this"""


Store = Callable[[int, torch.Tensor, torch.Tensor], None]
"""takes a layer's number, keys and values"""


@dataclass
class Prefix:
    """The first `length` tokens of a prompt, or of all: by layer (keys, values), each (length, kv heads, size).
    last: the id of the last one; -1: there is none."""

    length: int = 0
    last: int = -1
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Those of a packed row, behind what was there; its last slot is no token."""
        self.layers[layer] = (k[:-1].contiguous(), v[:-1].contiguous())


@dataclass
class Reading:
    """The tokens of a packed row, which stand behind a prefix. `store` is given each layer's keys and values, the
    prefix's in front."""

    prefix: Prefix
    layout: Layout
    store: Store

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring) -> torch.Tensor:
        if layer in self.prefix.layers:
            keys, values = self.prefix.layers[layer]
            k, v = torch.cat([keys, k]), torch.cat([values, v])
        self.store(layer, k, v)
        return attend(q, k, v, self.layout, how)


@dataclass
class Cache:
    """What the running replies remember: how many tokens each has, the last one's id, and by layer their keys and
    values."""

    lengths: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    layers: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        rows = list(rows)
        if rows == list(range(len(self.lengths))):
            return
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            longest = max(self.lengths[old] for _, old in moved)
            to, origin = (list(x) for x in zip(*moved, strict=True))
            for buffers in self.layers.values():
                for buffer in buffers:
                    buffer[to, :, :longest] = buffer[origin, :, :longest]
        self.lengths = [self.lengths[i] for i in rows]
        self.last = [self.last[i] for i in rows]
        # Give back what one long reply, or many at once, took long ago.
        n, longest = len(rows), max(self.lengths, default=0)
        for buffers in self.layers.values() if n else ():
            had, _, places, _ = buffers[0].shape
            few, short = had > 8 and 4 * n <= had, places > 4 * ROOM and 4 * longest <= places
            if few or short:
                self._resize(buffers, 2 * n if few else had, 2 * longest if short else places)

    def buffers(self, layer: int, like: Sequence[torch.Tensor], rows: int, places: int) -> list[torch.Tensor]:
        """The layer's keys and values, with room for so many rows and places.   like: (n, kv heads, size) each."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(0, x.shape[1], 0, x.shape[2]) for x in like]
        buffers = self.layers[layer]
        have_rows, _, have_places, _ = buffers[0].shape
        if have_rows < rows or have_places < places:
            rows = have_rows if rows <= have_rows else max(rows, min(2 * have_rows, rows + 8))
            self._resize(buffers, rows, max(places, have_places))
        return buffers

    def _resize(self, buffers: list[torch.Tensor], rows: int, places: int) -> None:
        """New buffers for so many rows and at least so many places, with what the rows hold."""
        used, longest = min(len(self.lengths), buffers[0].shape[0]), max(self.lengths, default=0)
        for i, old in enumerate(buffers):
            # Zeros, not whatever memory holds: a place that is masked is multiplied by zero, and NaN would survive it.
            buffers[i] = old.new_zeros(rows, old.shape[1], -(-places // ROOM) * ROOM, old.shape[3])
            buffers[i][:used, :, :longest] = old[:used, :, :longest]

    def row(self, row: int) -> Prefix:
        """What a row holds."""
        n = self.lengths[row]
        held = {layer: [x[row, :, :n].transpose(0, 1) for x in buffers] for layer, buffers in self.layers.items()}
        return Prefix(n, self.last[row], {layer: (k, v) for layer, (k, v) in held.items()})

    def grow(self, row: int, whole: Prefix, length: int) -> None:
        """A row gets what `whole`, which begins with what it holds, has of the places up to `length`."""
        had = self.lengths[row]
        for layer, states in whole.layers.items():
            for buffer, x in zip(self.buffers(layer, states, len(self.lengths), length), states, strict=True):
                buffer[row, :, had:length] = x[had:length].transpose(0, 1)
        self.lengths[row] = length

    def new_rows(self, paths: Sequence[NDArray[np.int64]], device: Any) -> tuple[Store, list[int]]:
        """(what writes a layer's keys and values into new rows, the lengths of all rows then).

        paths: for each row, which of the keys that `Store` is given it has, in their order.
        """
        lengths = [*self.lengths, *map(len, paths)]
        rows = np.repeat(np.arange(len(self.lengths), len(lengths)), [len(p) for p in paths])
        places = np.concatenate([np.arange(len(p)) for p in paths])
        to, at, which = (torch.from_numpy(x).to(device) for x in (rows, places, np.concatenate(paths)))

        def store(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
            for buffer, x in zip(self.buffers(layer, (k, v), len(lengths), max(lengths)), (k, v), strict=True):
                buffer[to, :, at] = x[which]

        return store, lengths


@dataclass
class Decoding:
    """One more token of every row.   positions: (rows,) the tokens that each has already."""

    cache: Cache
    positions: torch.Tensor
    rows: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, longest: int) -> torch.Tensor:
        """(rows, 1, longest) zero where a row's new token sees a place, else -inf; every layer asks for it."""
        if window not in self._masks:
            self._masks[window] = causal_mask(self.positions, longest, window, torch.float32)[:, None]
        return self._masks[window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring) -> torch.Tensor:
        """softmax(mask + cap(scale * q K^T)) V, the heads that share keys in one product; scores in fp32."""
        n, longest, kv_heads = len(k), max(self.cache.lengths) + 1, k.shape[1]
        buffers = self.cache.buffers(layer, (k, v), n, longest)
        if n == 1:
            return self._attend_one(buffers, longest, q, k, v, how)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[self.rows, :, self.positions] = new
        keys, values = (x[:n, :, :longest].flatten(0, 1) for x in buffers)
        queries = q.reshape(n * kv_heads, -1, q.shape[-1])
        scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(how.scale)
        if how.softcap is not None:
            scores = torch.tanh(scores / how.softcap) * how.softcap
        scores.view(n, kv_heads, -1, longest).add_(self.mask(how.window, longest)[:, None])
        out = torch.bmm(scores.softmax(-1).to(values.dtype), values)
        return out.view(n, q.shape[1], -1)

    def _attend_one(
        self, buffers: list[torch.Tensor], longest: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring
    ) -> torch.Tensor:
        """The same for a row that runs alone, which needs neither a mask nor a copy."""
        first = 0 if how.window is None else max(0, longest - how.window)
        seen = []
        for buffer, new in zip(buffers, (k, v), strict=True):
            row = buffer[0]
            row.select(1, longest - 1).copy_(new[0])
            seen.append(row.narrow(1, first, longest - first))
        keys, values = seen
        scores = torch.bmm(q.reshape(len(keys), -1, q.shape[-1]), keys.transpose(1, 2)).float().mul_(how.scale)
        if how.softcap is not None:
            scores = torch.tanh(scores / how.softcap) * how.softcap
        return torch.bmm(scores.softmax(-1).to(values.dtype), values).view(1, q.shape[1], -1)
