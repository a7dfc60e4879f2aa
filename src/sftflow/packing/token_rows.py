"""Token rows that are trained beside a frozen embedding: those of the tokens that a chat format has added.

peft keeps them in a layer of their own (`TrainableTokensLayer`) and copies the whole embedding at every forward pass to
put them in. Here they stand in the frozen weight itself, kept up to date (`refresh`), and only they get a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TokenRows:
    """The trained rows of one end of a model.

    wrapper: peft's, around the end.   weight: (vocabulary, width), frozen.   at: (n,) ids.   rows: (n, width), trained.
    """

    wrapper: torch.nn.Module
    weight: torch.Tensor
    at: torch.Tensor
    rows: torch.nn.Parameter

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the trained rows into the frozen weight, where all who only read it find them."""
        self.weight.index_copy_(0, self.at, self.rows.to(self.weight.dtype))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The embedding of ids, of any shape: a gradient reaches the trained rows and nothing else."""
        which = torch.full((self.weight.shape[0],), -1, device=ids.device)
        which[self.at] = torch.arange(len(self.at), device=ids.device)
        row = which[ids]
        out = F.embedding(ids, self.weight)
        return out.index_put((row >= 0).nonzero(as_tuple=True), F.embedding(row[row >= 0], self.rows))


def token_rows(end: Any) -> TokenRows | None:
    """Of a model's embedding or head; None where no rows of it are trained by themselves."""
    adapter = getattr(end, "token_adapter", None)
    if adapter is None:
        return None
    (name,) = adapter.trainable_tokens_delta
    weight = adapter.get_base_layer().weight
    return TokenRows(
        wrapper=end,
        weight=weight,
        at=torch.tensor(adapter.token_indices[name], device=weight.device),
        rows=adapter.trainable_tokens_delta[name],
    )


def is_plain(rows: TokenRows) -> bool:
    """Whether `embed` is all that the embedding does: some scale what they look up."""
    wrapper: Any = rows.wrapper
    return type(wrapper.token_adapter.get_base_layer()) is torch.nn.Embedding
