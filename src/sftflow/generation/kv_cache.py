"""Keys and values of running replies, and the attention that fills and reads them.

A layer's buffer is (rows, kv heads, room, size); row r holds `lengths[r]` tokens from place 0 on, so that no row is
padded and each may begin at any time. Rows that leave are closed up by moving the last ones into their places.

What stands before a row's own tokens (a beginning that all prompts have in common, or as much of one prompt as has been
read) is a `Prefix`. `Read`, `Prefill` and `Decode` are the plans of one forward pass: `packed_attention` asks each,
layer by layer, to attend; `done` books the tokens once all layers have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.packing.attention import Scoring, attend
from sftflow.packing.layout import Layout

ROOM = 128
"""places of a row come in multiples of this"""


@dataclass
class Prefix:
    """The first `length` tokens of a prompt, or of all: by layer (keys, values), each (length, kv heads, size)."""

    length: int = 0
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def copy(self) -> Prefix:
        return Prefix(self.length, dict(self.layers))

    def before(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values with these behind them."""
        if layer not in self.layers:
            return k, v
        keys, values = self.layers[layer]
        return torch.cat([keys, k]), torch.cat([values, v])


@dataclass
class Read:
    """The next `n` tokens of a prompt, a packed row of their own, become part of its prefix."""

    prefix: Prefix
    layout: Layout
    n: int

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring) -> torch.Tensor:
        k, v = self.prefix.before(layer, k, v)
        length = self.prefix.length + self.n
        self.prefix.layers[layer] = (k[:length].contiguous(), v[:length].contiguous())
        return attend(q, k, v, self.layout, how)

    def done(self) -> None:
        self.prefix.length += self.n


@dataclass
class Cache:
    """What the running replies remember: how many tokens each has, and by layer their keys and values."""

    lengths: list[int] = field(default_factory=list)
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
        self._shrink()

    def _shrink(self) -> None:
        """Give back what one long reply, or many at once, took long ago."""
        n, longest = len(self.lengths), max(self.lengths, default=0)
        for buffers in self.layers.values() if n else ():
            rows, _, places, _ = buffers[0].shape
            few, short = rows > 8 and 4 * n <= rows, places > 4 * ROOM and 4 * longest <= places
            if few or short:
                self._resize(buffers, 2 * n if few else rows, 2 * longest if short else places)

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

    def append(self, prefix: Prefix) -> None:
        """A prompt that has been read becomes the last row."""
        lengths = [*self.lengths, prefix.length]
        for layer, states in prefix.layers.items():
            for buffer, x in zip(self.buffers(layer, states, len(lengths), max(lengths)), states, strict=True):
                buffer[len(lengths) - 1, :, : prefix.length] = x.transpose(0, 1)
        self.lengths = lengths

    def prefilling(self, prefix: Prefix, layout: Layout, paths: Sequence[NDArray[np.int64]], device: Any) -> Prefill:
        """New rows for the conversations of a packed row, in the order of `paths` (their slots in it)."""
        n = prefix.length
        total = [n + len(path) for path in paths]
        rows = np.repeat(np.arange(len(self.lengths), len(self.lengths) + len(paths)), total)
        places = np.concatenate([np.arange(length) for length in total])
        keys = np.concatenate([np.concatenate([np.arange(n), path + n]) for path in paths])
        to, at, key = (torch.from_numpy(x).to(device) for x in (rows, places, keys))
        return Prefill(self, prefix, layout, to, at, key, [*self.lengths, *total])

    def decoding(self, device: Any) -> Decode:
        """One more token for every row."""
        positions = torch.tensor(self.lengths, device=device)
        return Decode(self, positions, torch.arange(len(self.lengths), device=device), [n + 1 for n in self.lengths])


@dataclass
class Prefill:
    """The prompts of one packed row, behind a prefix, become rows of the cache.

    rows, places: where in the buffers each key goes;   keys: which key it is, the prefix's first.
    """

    cache: Cache
    prefix: Prefix
    layout: Layout
    rows: torch.Tensor
    places: torch.Tensor
    keys: torch.Tensor
    lengths: list[int]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring) -> torch.Tensor:
        k, v = self.prefix.before(layer, k, v)
        buffers = self.cache.buffers(layer, (k, v), len(self.lengths), max(self.lengths))
        for buffer, states in zip(buffers, (k, v), strict=True):
            buffer[self.rows, :, self.places] = states[self.keys]
        return attend(q, k, v, self.layout, how)

    def done(self) -> None:
        self.cache.lengths = self.lengths


@dataclass
class Decode:
    """One more token of every row.   positions: (rows,) the tokens that each has already."""

    cache: Cache
    positions: torch.Tensor
    rows: torch.Tensor
    lengths: list[int]
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, longest: int) -> torch.Tensor:
        """(rows, 1, longest) zero where a row's new token sees a place, else -inf; every layer asks for it."""
        if window not in self._masks:
            place = torch.arange(longest, device=self.positions.device)
            hidden = place > self.positions[:, None]
            if window is not None:
                hidden |= place <= self.positions[:, None] - window
            mask = torch.zeros(hidden.shape, device=place.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scoring) -> torch.Tensor:
        """softmax(mask + cap(scale * q K^T)) V, the heads that share keys in one product; scores in fp32."""
        n, longest, kv_heads = len(self.lengths), max(self.lengths), k.shape[1]
        buffers = self.cache.buffers(layer, (k, v), n, longest)
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

    def done(self) -> None:
        self.cache.lengths = self.lengths
