"""The forward passes of generation: rows of running replies, their keys and values, and the next token's logits.

    add([prompt, ...])  ->  logits of the new rows, which stand behind the others
    step([token, ...])  ->  logits of all rows, one token further
    keep([row, ...])        the others leave

A prompt may also be read in parts, beside the rows that run: open() -> ids known from the start; read([id, ...]) ->
logits; join(), and it is the last row. drop() forgets it.

`PackedDecoder` computes tokens only: prompts as the packed rows of training (no padding, equal beginnings once), then
one token a row, so rows may come and go at any step. It works through transformers' attention interface. Models for
which that does not hold (state, attention sinks) have the modes of `own`; `prove` finds out on the very model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sftflow.generation.kv_cache import Cache, cached_attention
from sftflow.generation.onednn import OrderedWeights
from sftflow.packing.layout import layout_of
from sftflow.packing.pack import Example, pack_batch
from sftflow.runtime import Runtime

NAME = "sftflow_cached"
EVERY = 256
"""tokens whose logits are all held at once"""
PREFILL = 2048
"""tokens of prompts computed at once: enough for efficient products, small beside the weights"""


class Decoder(Protocol):
    """See the module.   can_refill: whether rows may be added while others run."""

    can_refill: bool

    def prompt_logits(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """(n, vocabulary) logits after each of the prompt's tokens, some at a time; nothing is kept."""
        ...

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor: ...

    def scores(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, vocabulary) logits after each prompt; nothing is kept."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class PackedDecoder:
    """Rows of different lengths side by side, without padding.

    While it is open the model attends through `cached_attention`; `close` puts back what was there.
    """

    can_refill = True

    def __init__(
        self, model: Any, runtime: Runtime, *, shared_prefix: Sequence[int] = (), ordered: OrderedWeights | None = None
    ) -> None:
        """shared_prefix: ids that every prompt begins with, computed here once.   ordered: faster copies of the
        weights."""
        from transformers import AttentionInterface

        self.model, self.runtime = model, runtime
        self.cache, self._reading = Cache(), Cache()
        self.shared_prefix: tuple[int, ...] = ()
        AttentionInterface.register(NAME, cached_attention)
        self._ordered = ordered
        if ordered is not None:
            ordered.use()
        self._before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        if shared_prefix:
            try:
                self._prefill([shared_prefix])
            except BaseException:
                self.close()
                raise
            self.cache.hold()
            self.shared_prefix = tuple(shared_prefix)

    def close(self) -> None:
        self.model.set_attn_implementation(self._before)
        if self._ordered is not None:
            self._ordered.stop()
        self.cache, self._reading = Cache(), Cache()

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        before = list(range(len(self.cache.lengths)))
        try:
            return torch.cat([self._prefill(part) for part in _parts(prompts, len(self.shared_prefix))])
        except BaseException:
            self.keep(before)  # none of them, and not the first few
            raise

    @torch.inference_mode()
    def scores(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, vocabulary) logits after each prompt; nothing is kept."""
        out = []
        for part in _parts(prompts, len(self.shared_prefix)):
            out.append(self._prefill(part))
            self.keep([])
        return torch.cat(out)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        device = self.model.device
        plan = self.cache.decoding(device)
        ids = torch.tensor([list(tokens)], device=device)
        return self._forward(ids, plan.positions[None], plan, 0)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)

    @torch.inference_mode()
    def open(self, *, whole: bool = False) -> int:
        """whole: from its first token on, not behind those that are shared_prefix."""
        self._reading = Cache()
        self._reading.begin(None if whole else self.cache, self.model.device)
        return self._reading.lengths[0]

    @torch.inference_mode()
    def read(self, ids: Sequence[int], *, every: bool = False) -> torch.Tensor:
        """(1, vocabulary) logits after the last of these tokens; every: (n, vocabulary), after each of them."""
        example = Example(ids=np.asarray([*ids, 0], np.int64), mask=np.asarray([0] * len(ids) + [1], np.int8))
        batch = pack_batch([example], multiple=1)
        device, known = self.model.device, self._reading.lengths[0]
        plan = self._reading.reading(layout_of(batch, device, known), batch.segments[0], device)
        slots = torch.from_numpy(batch.segments[0] if every else batch.label_positions).to(device)
        positions = torch.from_numpy(batch.positions + known).to(device)
        return self._forward(torch.from_numpy(batch.input_ids).to(device), positions, plan, slots)

    @torch.inference_mode()
    def join(self) -> None:
        self.cache.take_over(self._reading)
        self.drop()

    def drop(self) -> None:
        self._reading = Cache()

    def prompt_logits(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        self.open(whole=True)
        for start in range(0, len(prompt), EVERY):
            yield self.read(prompt[start : start + EVERY], every=True)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute prompts behind `shared_prefix` as one packed row; their keys become new rows of the cache."""
        n_shared = len(self.shared_prefix)
        examples = [
            Example(
                ids=np.asarray([*prompt[n_shared:], 0], np.int64),
                mask=np.asarray([0] * (len(prompt) - n_shared) + [1], np.int8),
                source=row,
            )
            for row, prompt in enumerate(prompts)
        ]
        batch = pack_batch(examples, multiple=1)
        device = self.model.device
        # `pack_batch` has put equal beginnings side by side; `sources` says which prompt each asked slot belongs to.
        order = np.argsort(batch.sources)
        plan = self.cache.prefilling(layout_of(batch, device, n_shared), [batch.segments[i] for i in order], device)
        ids = torch.from_numpy(batch.input_ids).to(device)
        positions = torch.from_numpy(batch.positions + n_shared).to(device)
        return self._forward(ids, positions, plan, torch.from_numpy(batch.label_positions[order]).to(device))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, plan: Any, wanted: Any) -> torch.Tensor:
        with self.runtime.autocast():
            logits = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted, plan=plan
            ).logits[0]
        plan.done()
        return torch.as_tensor(logits).float()


def _parts(prompts: Sequence[Sequence[int]], shared_prefix: int) -> list[list[Sequence[int]]]:
    """Prompts in their order, in parts of at most PREFILL tokens each (a longer prompt stands alone)."""
    out: list[list[Sequence[int]]] = []
    room = 0
    for prompt in prompts:
        own = len(prompt) - shared_prefix
        if not out or own > room:
            out.append([])
            room = PREFILL
        out[-1].append(prompt)
        room -= own
    return out
