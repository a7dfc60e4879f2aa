"""Keys and values of running replies, and the attention that fills and reads them.

A layer's buffer is (rows, kv heads, room, size); row r holds `lengths[r]` tokens from place 0 on, so that no row is
padded and each may begin at any time. Rows that leave are closed up by moving the last ones into their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.packing.attention import attend, in_autocast_dtype
from sftflow.packing.layout import Layout

ROOM = 128
"""places of a row come in multiples of this"""


@dataclass
class _Layer:
    """One layer's keys and values.   shared_keys, shared_values: (n_shared, kv heads, size) what every row begins
    with."""

    keys: torch.Tensor
    values: torch.Tensor
    shared_keys: torch.Tensor | None = None
    shared_values: torch.Tensor | None = None


@dataclass
class Cache:
    """Everything that running replies remember."""

    lengths: list[int] = field(default_factory=list)
    layers: dict[int, _Layer] = field(default_factory=dict)
    n_shared: int = 0

    def hold(self) -> None:
        """The one row that there is becomes the beginning of all that come."""
        (self.n_shared,) = self.lengths
        for layer in self.layers.values():
            layer.shared_keys = layer.keys[0, :, : self.n_shared].transpose(0, 1).contiguous()
            layer.shared_values = layer.values[0, :, : self.n_shared].transpose(0, 1).contiguous()
        self.lengths = []

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        rows = list(rows)
        if rows == list(range(len(self.lengths))):
            return
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            longest = max(self.lengths[old] for _, old in moved)
            to, origin = (list(x) for x in zip(*moved, strict=True))
            for layer in self.layers.values():
                for buffer in (layer.keys, layer.values):
                    buffer[to, :, :longest] = buffer[origin, :, :longest]
        self.lengths = [self.lengths[i] for i in rows]
        self._shrink()

    def _shrink(self) -> None:
        """Give back what one long reply, or many at once, took long ago."""
        n, longest = len(self.lengths), max(self.lengths, default=0)
        for layer in self.layers.values() if n else ():
            rows, places = layer.keys.shape[0], layer.keys.shape[2]
            few, short = rows > 8 and 4 * n <= rows, places > 4 * ROOM and 4 * longest <= places
            if few or short:
                rows, places = 2 * n if few else rows, -(-2 * longest // ROOM) * ROOM if short else places
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = _empty(old[0].transpose(0, 1), rows, places)
                    new[:n, :, :longest] = old[:n, :, :longest]
                    setattr(layer, name, new)

    def prefilling(self, layout: Layout, paths: Sequence[NDArray[np.int64]], device: Any) -> Prefill:
        """New rows for the conversations of a packed row, in the order of `paths` (their slots in it)."""
        first = len(self.lengths)
        total = [self.n_shared + len(path) for path in paths]
        rows = np.repeat(np.arange(first, first + len(paths)), total)
        places = np.concatenate([np.arange(n) for n in total])
        before = np.arange(self.n_shared)
        slots = np.concatenate([np.concatenate([before, path + self.n_shared]) for path in paths])
        to, at, key = (torch.from_numpy(np.asarray(x)).to(device) for x in (rows, places, slots))
        return Prefill(self, layout, to, at, key, [*self.lengths, *total])

    def begin(self, prefix: Cache | None, device: Any) -> None:
        """One row, to be read in parts; it has what `prefix` holds, or nothing."""
        self.lengths, self.layers = [0], {}
        if prefix is not None and prefix.n_shared:
            for number, layer in prefix.layers.items():
                assert layer.shared_keys is not None and layer.shared_values is not None
                mine = self.layer(number, layer.shared_keys, layer.shared_values, 1, prefix.n_shared)
                mine.keys[0, :, : prefix.n_shared] = layer.shared_keys.transpose(0, 1)
                mine.values[0, :, : prefix.n_shared] = layer.shared_values.transpose(0, 1)
            self.lengths = [prefix.n_shared]

    def reading(self, layout: Layout, path: NDArray[np.int64], device: Any) -> Prefill:
        """More tokens for the one row that there is (their slots in the packed row)."""
        (known,) = self.lengths
        to, at, key = (
            torch.from_numpy(np.asarray(x)).to(device)
            for x in (np.zeros_like(path), np.arange(known, known + len(path)), path + known)
        )
        return Prefill(self, layout, to, at, key, [known + len(path)], known)

    def take_over(self, other: Cache) -> None:
        """The other's one row becomes the last row here."""
        (length,) = other.lengths
        total = [*self.lengths, length]
        for number, layer in other.layers.items():
            key, value = (x[0].transpose(0, 1) for x in (layer.keys, layer.values))
            mine = self.layer(number, key, value, len(total), max(total))
            mine.keys[len(total) - 1, :, :length] = layer.keys[0, :, :length]
            mine.values[len(total) - 1, :, :length] = layer.values[0, :, :length]
        self.lengths = total

    def decoding(self, device: Any) -> Decode:
        """One more token for every row."""
        positions = torch.tensor(self.lengths, device=device)
        return Decode(self, positions, torch.arange(len(self.lengths), device=device), [n + 1 for n in self.lengths])

    def layer(self, number: int, key: torch.Tensor, value: torch.Tensor, rows: int, places: int) -> _Layer:
        """The layer's buffers, with room for so many rows and places."""
        layer = self.layers.get(number)
        if layer is None:
            layer = self.layers[number] = _Layer(_empty(key, 0, 0), _empty(value, 0, 0))
        if layer.keys.shape[0] < rows or layer.keys.shape[2] < places:
            have_rows, have_places = layer.keys.shape[0], layer.keys.shape[2]
            rows = rows if rows <= have_rows else max(rows, min(2 * have_rows, rows + 8))
            places = -(-max(places, have_places) // ROOM) * ROOM
            used = min(len(self.lengths), have_rows)
            longest = max(self.lengths, default=0)
            for name, like in (("keys", key), ("values", value)):
                old, new = getattr(layer, name), _empty(like, max(rows, have_rows), places)
                new[:used, :, :longest] = old[:used, :, :longest]
                setattr(layer, name, new)
        return layer


def _empty(like: torch.Tensor, rows: int, places: int) -> torch.Tensor:
    """Zeros, not whatever memory holds: a place that is masked is multiplied by zero, and NaN would survive that."""
    return torch.zeros(rows, like.shape[1], places, like.shape[2], dtype=like.dtype, device=like.device)


@dataclass
class Prefill:
    """How the prompts of one packed row are computed and remembered.

    rows, places: where in the buffers each key goes;   slots: which key it is, those held by all standing first.
    """

    cache: Cache
    layout: Layout
    rows: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    lengths: list[int]
    known: int = 0
    """tokens that the one row has already, where it is read in parts"""

    def attend(
        self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, how: Any
    ) -> torch.Tensor:
        layer = self.cache.layer(number, k, v, len(self.lengths), max(self.lengths))
        if self.known:
            k, v = (
                torch.cat([buffer[0, :, : self.known].transpose(0, 1), new])
                for buffer, new in ((layer.keys, k), (layer.values, v))
            )
        elif layer.shared_keys is not None and layer.shared_values is not None:
            k, v = torch.cat([layer.shared_keys, k]), torch.cat([layer.shared_values, v])
        for buffer, states in ((layer.keys, k), (layer.values, v)):
            buffer[self.rows, :, self.places] = states[self.slots]
        return attend(q, k, v, self.layout, scale, how[0], how[1], 0.0)

    def done(self) -> None:
        self.cache.lengths = self.lengths


@dataclass
class Decode:
    """How one more token of every row is computed.   positions: (rows,) the tokens that each has already."""

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

    def attend(
        self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, how: Any
    ) -> torch.Tensor:
        """softmax(mask + cap(scale * q K^T)) V, the heads that share keys in one product; scores in fp32."""
        window, softcap = how
        n, longest = len(self.lengths), max(self.lengths)
        layer = self.cache.layer(number, k, v, n, longest)
        layer.keys[self.rows, :, self.positions] = k
        layer.values[self.rows, :, self.positions] = v
        kv_heads = k.shape[1]
        keys, values = (x[:n, :, :longest].flatten(0, 1) for x in (layer.keys, layer.values))
        queries = q.reshape(n * kv_heads, -1, q.shape[-1])
        scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores.view(n, kv_heads, -1, longest).add_(self.mask(window, longest)[:, None])
        out = torch.bmm(scores.softmax(-1).to(values.dtype), values)
        return out.view(n, q.shape[1], -1)

    def done(self) -> None:
        self.cache.lengths = self.lengths


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Prefill | Decode | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (1, heads, tokens, size) -> (1, tokens, heads, size)."""
    if plan is None:
        raise ValueError("cached attention needs a plan")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = in_autocast_dtype(*(x[0].transpose(0, 1) for x in (query, key, value)))
    with torch.autocast(query.device.type, enabled=False):
        out = plan.attend(int(getattr(module, "layer_idx")), q, k, v, scale, (sliding_window, softcap))  # noqa: B009
    return out[None].to(query.dtype), None
