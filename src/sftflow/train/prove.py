"""The proof, on the very model and machine, that it can be trained packed.

Sequences with a common beginning are computed packed, through our attention and our head, and alone through the
model's own forward pass; the logits must agree. Architectures with state (Mamba), other heads or attention that ignores
transformers' interface fail here and are refused by name, before anything is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sftflow.errors import CheckpointError
from sftflow.mixture.pack import Example, pack_batch
from sftflow.train.attention import use_packed_attention
from sftflow.train.layout import layout_of
from sftflow.train.loss import head_of, logits_of

REMEDY = "set train.packing: false (each conversation alone, padded), or use a decoder-only attention model"
TOLERANCE = 2e-3
"""of the largest logit; fp32 products on a GPU may be rounded to 10 bits (TF32)"""


@torch.no_grad()
def prove_forward(model: Any) -> None:
    """Raises CheckpointError, naming the architecture, where packed logits are not the model's own."""
    name = type(model).__name__
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    try:
        gap, size = _gap(model)
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            "base", f"{name} cannot be trained packed: {type(error).__name__}: {first}", REMEDY
        ) from error
    finally:
        model.set_attn_implementation(implementation)
        model.train(was_training)
    if not np.isfinite(size):
        return  # weights that are not finite prove nothing; training will say so
    if not gap <= TOLERANCE * max(1.0, size):
        raise CheckpointError(
            "base", f"{name} cannot be trained packed: packed and alone differ by {gap:.2g} in the logits", REMEDY
        )


def _gap(model: Any) -> tuple[float, float]:
    """(largest difference, largest logit) of sequences packed and alone."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, vocabulary, 5)
    pieces = [np.concatenate([beginning, rng.integers(0, vocabulary, n)]) for n in (9, 4)]
    pieces.append(rng.integers(0, vocabulary, 21))
    batch = pack_batch([Example(ids=p, mask=np.ones(len(p), np.int8)) for p in pieces])
    model.set_attn_implementation("eager")
    alone = {tuple(p[:-1]): _alone(model, p[:-1]) for p in pieces}
    use_packed_attention(model)
    hidden = model.base_model(
        input_ids=torch.from_numpy(batch.input_ids).to(model.device),
        position_ids=torch.from_numpy(batch.positions).to(model.device),
        layout=layout_of(batch, model.device),
        use_cache=False,
    ).last_hidden_state[0]
    packed = logits_of(hidden, head_of(model))
    gap = size = 0.0
    for path in batch.paths:
        wanted = alone[tuple(batch.input_ids[0, path])]
        gap = max(gap, float((packed[torch.from_numpy(path).to(packed.device)] - wanted).abs().max()))
        size = max(size, float(wanted.abs().max()))
    return gap, size


def _alone(model: Any, ids: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False).logits
    return logits[0].float()
