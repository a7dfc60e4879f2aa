"""Decoding with the model's own forward pass and cache, for models whose rows cannot stand in one row of tokens.

A batch is computed at once, padded on the left, where attention is all that looks back. State would run through the
padding, so models that have some are computed a sequence at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from sftflow.foundation.runtime import Runtime
from sftflow.packing.attending import attending

CACHES = ("past_key_values", "cache_params", "state", "mems")
"""the names by which architectures return their cache or state, and take it again"""

AT_ONCE = 1024
"""tokens of a prompt whose logits are all held"""


@dataclass
class _Group:
    """Rows that are computed together, (rows, length) each.   mask: 1 where a token stands, 0 in the padding before it.
    cache: by the name under which the model takes it; {}: nothing is remembered."""

    ids: torch.Tensor
    mask: torch.Tensor
    cache: dict[str, Any]


class OwnDecoder:
    """`add`, `step` and `keep` as `decoder` has them, by the model's own forward pass.

    padded: all rows are one group; no row can come later (`can_refill`). Else each row is one, without padding, at the
    price of reading the weights for each.   cached: sequences of up to so many tokens are computed with what the model
    itself remembers of them; longer ones are computed whole at every token, which is right whatever a model does, and
    slow. 0: all of them.
    """

    def __init__(self, model: Any, runtime: Runtime, *, padded: bool, cached: int = 1 << 30) -> None:
        self.model, self.runtime, self.cached = model, runtime, cached
        self.can_refill = not padded
        self._groups: list[_Group] = []
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._mode = ExitStack()
        self._mode.enter_context(attending(model, "own"))

    def close(self) -> None:
        self.keep([])
        self._mode.close()

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        groups = [self._group([p]) for p in prompts] if self.can_refill else [self._group(prompts)]
        logits = torch.cat([self._forward(group, group.ids) for group in groups])
        self._groups += groups
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        out = []
        column = torch.tensor(tokens, device=self.model.device)[:, None]
        for group, new in zip(self._groups, column.split([len(g.ids) for g in self._groups]), strict=True):
            group.ids = torch.cat([group.ids, new], 1)
            group.mask = torch.cat([group.mask, torch.ones_like(new)], 1)
            out.append(self._forward(group, new))
        return torch.cat(out)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if self.can_refill or not rows:
            self._groups = [self._groups[i] for i in rows]
            return
        (group,) = self._groups
        index = torch.tensor(list(rows), device=self.model.device)
        group.cache["past_key_values"].batch_select_indices(index)
        group.ids, group.mask = group.ids[index], group.mask[index]

    def scores(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, vocabulary) logits after each prompt; nothing is kept."""
        out = self.add(prompts)
        self.keep([])
        return out

    @torch.inference_mode()
    def prompt_logits(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """(n, vocabulary) logits after each of the prompt's tokens, some at a time; nothing is kept.

        It is computed again for each AT_ONCE tokens, so that never more than their logits are held.
        """
        ids = torch.tensor([list(prompt)], device=self.model.device)
        in_parts = "logits_to_keep" in self._takes
        size = AT_ONCE if in_parts else len(prompt)
        for start in range(0, len(prompt), size):
            wanted = torch.arange(start, min(start + size, len(prompt)), device=ids.device)
            some = {"logits_to_keep": wanted} if in_parts else {}
            with self.runtime.autocast():
                logits = self.model(input_ids=ids, use_cache=False, **some).logits[0]
            yield torch.as_tensor(logits).float()

    def _group(self, prompts: Sequence[Sequence[int]]) -> _Group:
        from transformers import DynamicCache

        longest = max(len(p) for p in prompts)
        rows = [([0] * (longest - len(p)) + list(p), [0] * (longest - len(p)) + [1] * len(p)) for p in prompts]
        ids, mask = (torch.tensor(x, device=self.model.device) for x in zip(*rows, strict=True))
        return _Group(ids, mask, {} if self.can_refill else {"past_key_values": DynamicCache(config=self.model.config)})

    def _forward(self, group: _Group, new: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits after the group's last tokens. new: those that its cache does not know."""
        use_cache = group.ids.shape[1] <= self.cached
        if not use_cache:
            new, group.cache = group.ids, {}
        more: dict[str, Any] = {} if self.can_refill else {"attention_mask": group.mask}
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        if "position_ids" in self._takes:
            more["position_ids"] = (group.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with self.runtime.autocast():
            out = self.model(input_ids=new, use_cache=use_cache, **group.cache, **more)
        if use_cache:
            group.cache = {name: out[name] for name in CACHES if name in out and name in self._takes}
            if not group.cache:
                raise ValueError("the model gives back nothing to go on from")
        return torch.as_tensor(out.logits[:, -1]).float()
