"""The proof, on the very model and machine, that it can be trained packed.

Sequences with a common beginning are computed packed, through our attention and our head, and alone through the
model's own forward pass; the logits must agree. And no hidden state may depend on another sequence of its row: the
derivative is exactly zero, however small the weights are. Architectures with state (Mamba, short convolutions), other
heads or attention that ignores transformers' interface fail here and are refused by name, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sftflow.foundation.errors import CheckpointError, first_line
from sftflow.packing.attending import attending, evaluating, own_logits
from sftflow.packing.length_limits import length_limit, short_windows
from sftflow.packing.loss import head_of, hidden_states, logits_of
from sftflow.packing.pack import Example, pack_batch, pad_batch

UNPACKED = "set train.packing: false (each conversation alone, padded), or use a decoder-only attention model"
OTHER = "use another base"
EXACT, COARSE = 1e-4, 2e-3
"""of the largest logit, for fp32 on a CPU, and for all else: a GPU may round fp32 products to 10 bits (TF32)"""


def check_length(model: Any, max_length: int) -> None:
    """Raises CheckpointError where the model computes conversations of up to `max_length` differently by length, which
    the short sequences of `prove_forward` would not show."""
    limit = length_limit(model)
    if limit is not None and max_length > limit[0]:
        raise CheckpointError(
            "train.max_length",
            f"{type(model).__name__}: {limit[1]} beyond {limit[0]} tokens",
            f"lower it to {limit[0]} or less",
        )


def prove_forward(model: Any, packed: bool = True) -> None:
    """Raises CheckpointError, naming the architecture, where our logits are not those of the model's own forward pass.

    packed: through `packed_attention`; else only the body and the head are compared.
    """
    name = type(model).__name__
    refuse = f"{name} cannot be trained{' packed' if packed else ''}"
    remedy = UNPACKED if packed else OTHER
    try:
        with evaluating(model), short_windows(model), _without_zeros(model):
            gap, size = _gap(model, packed)
            seen = packed and sees_neighbours(model)
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError("base", f"{refuse}: {type(error).__name__}: {first_line(error)}", remedy) from error
    if not np.isfinite(size):
        return  # weights that are not finite prove nothing; training will say so
    if seen:
        raise CheckpointError("base", f"{refuse}: it carries state from one conversation into the next", remedy)
    weight = next(model.parameters())
    exact = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not gap <= (EXACT if exact else COARSE) * size:
        fact = f"{refuse}: its logits are not those that training would compute ({gap:.2g} off, of {size:.2g})"
        raise CheckpointError("base", fact, remedy)


def sees_neighbours(model: Any) -> bool:
    """Whether a hidden state depends on another sequence of its packed row, by any path of any strength: the derivative
    by the other's embeddings is not exactly zero. (Attention gives it exactly: a weight of zero, or no product at all.)
    """
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, model.get_input_embeddings().weight.shape[0], n) for n in (9, 6, 14)]
    batch = pack_batch([Example(ids=p, mask=np.ones(len(p), np.int8)) for p in pieces])
    embedded: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may change in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), attending(model, "packed", few_passes=True):
            hidden = hidden_states(model, batch, packed=True)
    finally:
        handle.remove()
    middle = sorted(batch.segments, key=lambda path: int(path[0]))[1]  # it has one before it and one behind
    own = hidden[torch.from_numpy(middle).to(hidden.device)]
    direction = torch.from_numpy(rng.standard_normal(tuple(own.shape))).to(own)
    slopes = torch.autograd.grad((own * direction).sum(), embedded)  # one for each look into the embedding
    others = torch.from_numpy(np.setdiff1d(np.arange(hidden.shape[0]), middle)).to(hidden.device)
    return any(bool(slope.reshape(hidden.shape[0], -1)[others].any()) for slope in slopes)


@contextmanager
def _without_zeros(model: Any) -> Iterator[None]:
    """While it lasts, parameters that are all zero (projections of a fresh model, gates that open in training) hold
    random numbers: nothing can be seen through a zero."""
    source = torch.Generator().manual_seed(0)
    zeros = [p.data for p in model.parameters() if not p.any()]
    try:
        for weight in zeros:
            width = weight.shape[-1] if weight.ndim > 1 else 4
            weight.copy_(torch.randn(weight.shape, generator=source) / width**0.5)
        yield
    finally:
        for weight in zeros:
            weight.zero_()


@torch.no_grad()
def _gap(model: Any, packed: bool) -> tuple[float, float]:
    """(largest difference, largest logit) between our way and the model's own on a few sequences."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, vocabulary, 5)
    pieces = [np.concatenate([beginning, rng.integers(0, vocabulary, n)]) for n in (9, 4)]
    pieces.append(rng.integers(0, vocabulary, 21))
    with attending(model, "eager" if packed else "own"):
        alone = {tuple(p[:-1]): own_logits(model, p[:-1]) for p in pieces}
    examples = [Example(ids=p, mask=np.ones(len(p), np.int8)) for p in pieces]
    batch = pack_batch(examples) if packed else pad_batch(examples)
    with attending(model, "packed" if packed else "own", few_passes=True):
        ours = logits_of(hidden_states(model, batch, packed=packed), head_of(model))
    gap = size = 0.0
    for path in batch.segments:
        wanted = alone[tuple(batch.input_ids.ravel()[path])]
        gap = max(gap, float((ours[torch.from_numpy(path).to(ours.device)] - wanted).abs().max()))
        size = max(size, float(wanted.abs().max()))
    return gap, size
