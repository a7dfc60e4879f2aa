"""Decoding with the model's own forward pass and cache, for models whose rows cannot stand in one row of tokens.

`PaddedDecoder` computes a batch at once, padded on the left, which is right where attention is all that looks back.
State runs through padding, so such models are computed a sequence at a time by `SingleDecoder`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from sftflow.packing.attending import attending
from sftflow.runtime import Runtime

CACHES = ("past_key_values", "cache_params", "state", "mems")
"""the names by which architectures return their cache or state, and take it again"""


class OwnDecoder(ABC):
    """`add`, `step` and `keep` of `decoder`, by the model's own forward pass.

    can_refill: whether rows may be added while others run.
    """

    can_refill: bool

    def __init__(self, model: Any, runtime: Runtime) -> None:
        self.model, self.runtime = model, runtime
        self._mode = ExitStack()
        self._mode.enter_context(attending(model, "own"))

    @abstractmethod
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor: ...

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> torch.Tensor: ...

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None: ...

    def close(self) -> None:
        self.keep([])
        self._mode.close()

    def scores(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, vocabulary) logits after each prompt; nothing is kept."""
        out = self.add(prompts)
        self.keep([])
        return out

    @torch.inference_mode()
    def prompt_logits(self, prompt: Sequence[int], at_once: int = 1024) -> Iterator[torch.Tensor]:
        """(n, vocabulary) logits after each of the prompt's tokens, some at a time; nothing is kept.

        It is computed again for each `at_once` tokens, so that never more than their logits are held.
        """
        ids = torch.tensor([list(prompt)], device=self.model.device)
        in_parts = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        for start in range(0, len(prompt), at_once if in_parts else len(prompt)):
            end = min(start + at_once, len(prompt)) if in_parts else len(prompt)
            some = {"logits_to_keep": torch.arange(start, end, device=ids.device)} if in_parts else {}
            with self.runtime.autocast():
                logits = self.model(input_ids=ids, use_cache=False, **some).logits[0]
            yield torch.as_tensor(logits).float()


class PaddedDecoder(OwnDecoder):
    """The model's own cache over rows padded on the left: for any causal model, but no row can come later."""

    can_refill = False

    def __init__(self, model: Any, runtime: Runtime) -> None:
        super().__init__(model, runtime)
        self._cache: Any = None
        self._mask = self._position = torch.empty(0)

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        from transformers import DynamicCache

        device, longest = self.model.device, max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        self._mask = mask.to(device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._position = positions[:, -1]
        self._cache = DynamicCache(config=self.model.config)
        return self._forward(ids.to(device), positions)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._position = self._position + 1
        ids = torch.tensor(list(tokens), device=self._mask.device)[:, None]
        return self._forward(ids, self._position[:, None])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._cache = None
            return
        index = torch.tensor(list(rows), device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._position = self._mask[index], self._position[index]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self.runtime.autocast():
            logits = self.model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return torch.as_tensor(logits).float()


@dataclass
class _Row:
    ids: list[int]
    cache: dict[str, Any]  # by the name under which the model takes it; {}: nothing is remembered


class SingleDecoder(OwnDecoder):
    """A sequence at a time, without padding: for any causal model, at the price of reading the weights for each row.

    cached: sequences of up to so many tokens are computed with what the model itself remembers of them; longer ones
    are computed whole at every token, which is right whatever a model does, and slow. 0: all of them.
    """

    can_refill = True

    def __init__(self, model: Any, runtime: Runtime, *, cached: int) -> None:
        super().__init__(model, runtime)
        self.cached = cached
        self._rows: list[_Row] = []
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        rows = [_Row(list(p), {}) for p in prompts]
        logits = torch.stack([self._forward(row, row.ids) for row in rows])
        self._rows += rows
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        for row, token in zip(self._rows, tokens, strict=True):
            row.ids.append(token)
        return torch.stack([self._forward(row, row.ids[-1:]) for row in self._rows])

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]

    def _forward(self, row: _Row, new: Sequence[int]) -> torch.Tensor:
        """(vocabulary,) logits after the row's last token. new: the tokens that its cache does not know."""
        use_cache = len(row.ids) <= self.cached
        if not use_cache:
            new, row.cache = row.ids, {}
        more: dict[str, Any] = {}
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        if "position_ids" in self._takes:
            more["position_ids"] = torch.arange(len(row.ids) - len(new), len(row.ids), device=self.model.device)[None]
        ids = torch.tensor([list(new)], device=self.model.device)
        with self.runtime.autocast():
            out = self.model(input_ids=ids, use_cache=use_cache, **row.cache, **more)
        if use_cache:
            row.cache = {name: out[name] for name in CACHES if name in out and name in self._takes}
            if not row.cache:
                raise ValueError("the model gives back nothing to go on from")
        return torch.as_tensor(out.logits[0, -1]).float()
