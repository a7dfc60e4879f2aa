"""Putting a model into another way of computing, and back.

    with attending(model, "packed"):
        ...                               # its attention is `packed_attention`
    ...                                   # everything as it was found

Every change that is not for good goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from sftflow.packing.attention import NAME, packed_attention
from sftflow.packing.fused import fused

Mode = Literal["packed", "own", "eager"]
_ABSENT = object()


@contextmanager
def changed(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """While it lasts, each (object, attribute, value) is set; then each attribute is what it was, or absent again."""
    changes = list(changes)
    before = [(target, name, vars(target).get(name, _ABSENT)) for target, name, _ in changes]
    try:
        for target, name, value in changes:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in before:
            if value is _ABSENT:
                vars(target).pop(name, None)
            else:
                setattr(target, name, value)


@contextmanager
def attending(
    model: Any,
    mode: Mode,
    *,
    forwards: Iterable[tuple[torch.nn.Module, Callable[..., Any]]] = (),
    sparse_embedding: bool = False,
    few_passes: bool = False,
) -> Iterator[None]:
    """While it lasts, `model` (a transformers causal LM) computes in this mode. May be nested.

    mode: "packed": packed rows, through `packed_attention`; the forward pass must be given the batch's `layout`, or a
    `plan` for the keys and values that are kept.   "own": the attention that it has; where that is "packed", torch's.
    "eager": transformers' plain formulas.
    forwards: layers, each with the function that computes it meanwhile.
    sparse_embedding: the gradient of the token embedding is added to its `.grad` row by row, and not as a second tensor
    of the vocabulary's size; only where that `.grad` is there already, and on a CPU.
    few_passes: the elementwise work of blocks that are known is done as `fused` does it.
    """
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    name = {"packed": NAME, "eager": "eager", "own": before}[mode]
    if name == NAME and mode == "own":
        name = "sdpa" if model._supports_sdpa else "eager"
    changes: list[tuple[Any, str, Any]] = [(layer, "forward", forward) for layer, forward in forwards]
    if few_passes:
        changes = [*fused(model), *changes]
    embedding = model.get_input_embeddings()
    if sparse_embedding and isinstance(embedding, torch.nn.Embedding):
        weight = embedding.weight
        plain = type(weight) is torch.nn.Parameter  # not one of which each rank has a part
        changes.append((embedding, "sparse", plain and weight.device.type == "cpu" and weight.grad is not None))
    AttentionInterface.register(NAME, packed_attention)
    try:
        if name != before:  # setting it walks through all modules, even where it changes nothing
            model.set_attn_implementation(name)
        with changed(changes):
            yield
    finally:
        if name != before:
            model.set_attn_implementation(before)


def evaluating(model: Any) -> AbstractContextManager[None]:
    """While it lasts, no module of the model is in training mode: nothing is dropped out."""
    return changed((module, "training", False) for module in model.modules())


def own_logits(model: Any, ids: Iterable[int]) -> torch.Tensor:
    """(tokens, vocabulary) fp32 logits of one sequence by the model's own forward pass, without a cache: what every
    other way of computing it is compared with."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return logits[0].float()
