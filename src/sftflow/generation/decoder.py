"""The forward passes of generation: rows of running replies, their keys and values, and the next token's logits.

    add([prompt, ...])  ->  logits of the new rows, which stand behind the others
    step([token, ...])  ->  logits of all rows, one token further
    keep([row, ...])        the others leave

Every decoder has these. In `PackedDecoder` a prompt may also be read in parts, beside the rows that run: read(prefix,
[id, ...]) -> logits, and the prefix has these tokens, too; join(prefix), and it is the last row.

`PackedDecoder` computes tokens only: prompts as the packed rows of training (no padding, equal beginnings once), then
one token a row, so rows may come and go at any step. It works through transformers' attention interface. For models
where that does not hold (state, attention sinks) there are those of `hf_decoders`; `check_decoder` finds out on the
very model which is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftflow.foundation.runtime import Runtime
from sftflow.generation.kv_cache import Cache, Decoding, Prefix, Reading, Store
from sftflow.generation.llama import LlamaStep, is_plain
from sftflow.generation.onednn import Forwards
from sftflow.packing.attending import attending
from sftflow.packing.layout import layout_of
from sftflow.packing.loss import needs_previous_ids
from sftflow.packing.pack import Example, PackedBatch, pack_batch

PREFILL = 2048
"""tokens of prompts computed at once: enough for efficient products, small beside the weights"""


class PackedDecoder:
    """Rows of different lengths side by side, without padding.

    While it is open the model attends through `packed_attention`; `close` puts back what was there.
    """

    can_refill = True

    def __init__(
        self,
        model: Any,
        runtime: Runtime,
        *,
        shared_prefix: Sequence[int] = (),
        forwards: Forwards | None = None,
        next_step: LlamaStep | None = None,
    ) -> None:
        """shared_prefix: ids that every prompt begins with, computed here once.   forwards: see `ordered_forwards`.
        next_step: what computes `step` in place of the model's own forward pass, unless that has been changed since."""
        self.model, self.runtime = model, runtime
        self._next_step = next_step if next_step is not None and is_plain(model) else None
        self.cache, self.prefix = Cache(), Prefix()
        self._needs_previous = needs_previous_ids(model)
        self._mode = ExitStack()
        self._mode.enter_context(attending(model, "packed", forwards=forwards or ()))
        if shared_prefix:
            try:
                self.read(self.prefix, shared_prefix)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        self._mode.close()
        self.cache, self.prefix = Cache(), Prefix()

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        before = list(range(len(self.cache.lengths)))
        try:
            return torch.cat([self._prefill(part) for part in _parts(prompts, self.prefix.length)])
        except BaseException:
            self.keep(before)  # none of them, and not the first few
            raise

    @torch.inference_mode()
    def scores(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, vocabulary) logits after each prompt; nothing is kept."""
        out = []
        for part in _parts(prompts, self.prefix.length):
            out.append(self._prefill(part))
            self.keep([])
        return torch.cat(out)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        rows = list(range(len(tokens)))
        ids, positions, to = (torch.tensor(x, device=self.model.device) for x in (tokens, self.cache.lengths, rows))
        plan = Decoding(self.cache, positions, to)
        if self._next_step is not None:
            logits = self._next_step(ids, positions, plan)
        else:
            logits = self._forward(ids[None], positions[None], plan, 0, np.asarray([self.cache.last]))
        self.cache.lengths = [n + 1 for n in self.cache.lengths]
        self.cache.last = list(tokens)
        return logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)

    @torch.inference_mode()
    def read(self, prefix: Prefix, ids: Sequence[int], *, every: bool = False) -> torch.Tensor:
        """(1, vocabulary) logits after the last of these tokens; every: (n, vocabulary), after each of them."""
        batch = _packed([ids], 0)
        logits = self._read(batch, prefix, prefix.extend, batch.segments[0] if every else batch.label_positions)
        prefix.length += len(ids)
        prefix.last = ids[-1]
        return logits

    @torch.inference_mode()
    def follow(self, row: int, tokens: Sequence[int], take: Callable[[torch.Tensor], int]) -> None:
        """Read tokens behind a row's own. take: given (n, vocabulary) logits after each; says how many of them stay."""
        whole = self.cache.row(row)
        before = whole.length
        n = take(self.read(whole, tokens, every=True))
        self.cache.grow(row, whole, before + n)
        self.cache.last[row] = tokens[n - 1]

    @torch.inference_mode()
    def join(self, prefix: Prefix) -> None:
        store, lengths = self.cache.new_rows([np.arange(prefix.length)], self.model.device)
        for layer, states in prefix.layers.items():
            store(layer, *states)
        self.cache.lengths = lengths
        self.cache.last = [*self.cache.last, prefix.last]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute prompts behind the shared prefix as one packed row; their keys become new rows of the cache."""
        n = self.prefix.length
        batch = _packed(prompts, n)
        # `pack_batch` has put equal beginnings side by side; `sources` says which prompt each asked slot belongs to.
        order = np.argsort(batch.sources)
        paths = [np.concatenate([np.arange(n), batch.segments[i] + n]) for i in order]
        store, lengths = self.cache.new_rows(paths, self.model.device)
        logits = self._read(batch, self.prefix, store, batch.label_positions[order])
        self.cache.lengths = lengths
        self.cache.last = [*self.cache.last, *(prompt[-1] for prompt in prompts)]
        return logits

    def _read(self, batch: PackedBatch, prefix: Prefix, store: Store, wanted: NDArray[np.int64]) -> torch.Tensor:
        """(len(wanted), vocabulary) logits of these slots of a packed row that stands behind a prefix."""
        plan = Reading(prefix, layout_of(batch, self.model.device, prefix.length), store)
        ids, positions, slots = (
            torch.from_numpy(x).to(self.model.device)
            for x in (batch.input_ids, batch.positions + prefix.length, wanted)
        )
        return self._forward(ids, positions, plan, slots, batch.previous_ids(prefix.last))

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, plan: Any, wanted: Any, previous: NDArray[np.int64]
    ) -> torch.Tensor:
        more = {"previous_ids": torch.from_numpy(previous).to(ids.device)} if self._needs_previous else {}
        with self.runtime.autocast():
            logits = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted, plan=plan, **more
            ).logits[0]
        return torch.as_tensor(logits).float()


def _packed(prompts: Sequence[Sequence[int]], n_before: int) -> PackedBatch:
    """What follows the first `n_before` ids of each prompt, as one packed row that asks for the token after each."""
    examples = [
        Example(
            ids=np.asarray([*prompt[n_before:], 0], np.int64),
            mask=np.asarray([0] * (len(prompt) - n_before) + [1], np.int8),
            source=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    return pack_batch(examples, multiple=1)


def _parts(prompts: Sequence[Sequence[int]], n_shared: int) -> list[list[Sequence[int]]]:
    """Prompts in their order, in parts of at most PREFILL tokens each (a longer prompt stands alone)."""
    out: list[list[Sequence[int]]] = []
    room = 0
    for prompt in prompts:
        own = len(prompt) - n_shared
        if not out or own > room:
            out.append([])
            room = PREFILL
        out[-1].append(prompt)
        room -= own
    return out
