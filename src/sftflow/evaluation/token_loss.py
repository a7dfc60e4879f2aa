"""The loss of single tokens, by the forward pass of training: packed where the model can be, else each row alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.checkpoint import Assistant
from sftflow.foundation.errors import CheckpointError
from sftflow.packing.attending import evaluating
from sftflow.packing.check_model import prove_forward
from sftflow.packing.length_limits import length_limit
from sftflow.packing.loss import batch_loss
from sftflow.packing.pack import Example, PackedBatch, pack_batch, pad_batch, split_padded, split_step

MICRO_TOKENS = 8192
"""slots that are computed at once"""
Float = NDArray[np.float64]


def token_losses(assistant: Assistant, examples: Sequence[Example]) -> list[Float]:
    """For each example (m,) nats of its supervised tokens, in order; the first token is never among them.

    Packed where the model can be, else each example alone and padded. Leaves the model as it was found. Raises
    CheckpointError where its logits are not those of our head.
    """
    model, runtime = assistant.model, assistant.engine.runtime
    out = [np.zeros(0)] * len(examples)
    with evaluating(model):
        numbered = [replace(e, source=i) for i, e in enumerate(examples)]
        for batch, packed in _batches(numbered, model, _can_pack(assistant)):
            losses = batch_loss(model, batch, runtime, packed=packed).cpu().double().numpy()
            for i in np.unique(batch.sources):
                out[i] = losses[batch.sources == i]
    return out


def _batches(examples: Sequence[Example], model: Any, packed: bool) -> Iterator[tuple[PackedBatch, bool]]:
    """(batch, whether it is packed). A row so long that the model computes it differently by length stands alone."""
    limit = length_limit(model)
    most = math.inf if limit is None else limit[0]
    short = [e for e in examples if len(e.ids) <= most and e.mask[1:].any()]
    if packed and short:
        yield from ((pack_batch(part), True) for part in split_step(short, MICRO_TOKENS))
    else:
        yield from ((pad_batch(part), False) for part in split_padded(short, MICRO_TOKENS))
    yield from ((pad_batch([e]), False) for e in examples if len(e.ids) > most and e.mask[1:].any())


def _can_pack(assistant: Assistant) -> bool:
    """Proven on the model itself, as training does."""
    try:
        prove_forward(assistant.model)
        return True
    except CheckpointError:
        try:
            prove_forward(assistant.model, packed=False)
        except CheckpointError as error:
            raise CheckpointError(assistant.name, f"its loss cannot be measured ({error.fact})", error.remedy) from None
        return False
