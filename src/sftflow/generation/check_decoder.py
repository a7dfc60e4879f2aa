"""Which decoder is right for a model.

    mode        decoder                              for models
    "packed"    PackedDecoder                        whose attention goes through transformers' interface
    "padded"    OwnDecoder, rows in one batch        where attention is all that looks back
    "single"    OwnDecoder, row by row               with other state
    "whole"     OwnDecoder, row by row, no cache     all others: every token computes the whole sequence again

It is found out on the very model, against its own forward pass without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from sftflow.foundation.errors import CheckpointError, first_line
from sftflow.foundation.runtime import Runtime
from sftflow.generation.decoder import PackedDecoder
from sftflow.generation.hf_decoders import OwnDecoder
from sftflow.generation.llama import LlamaStep, step_of
from sftflow.generation.onednn import Forwards, may_order, ordered_forwards
from sftflow.packing.attending import attending, own_logits
from sftflow.packing.check_model import sees_neighbours
from sftflow.packing.length_limits import short_windows

DecodeMode = Literal["packed", "padded", "single", "whole"]
Decoder = PackedDecoder | OwnDecoder
EXACT, COARSE, BF16 = 1e-4, 2e-3, 0.05
"""of the largest logit, for: fp32 on a CPU; fp32 elsewhere, whose products may be rounded to 10 bits (TF32); bf16"""
HELD = 3
"""tokens that all sequences begin with"""
BROKEN = (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, LookupError, AssertionError)


def make_decoder(
    mode: DecodeMode,
    model: Any,
    runtime: Runtime,
    *,
    shared_prefix: Sequence[int] = (),
    forwards: Forwards | None = None,
    next_step: LlamaStep | None = None,
    length_limit: int = 1 << 30,
) -> Decoder:
    """shared_prefix, forwards, next_step: see `PackedDecoder`.   length_limit: tokens up to which the model's own cache
    is used in mode "single"."""
    if mode == "packed":
        return PackedDecoder(model, runtime, shared_prefix=shared_prefix, forwards=forwards, next_step=next_step)
    cached = {"padded": 1 << 30, "single": length_limit, "whole": 0}[mode]
    return OwnDecoder(model, runtime, padded=mode == "padded", cached=cached)


def find_decode_mode(
    model: Any, runtime: Runtime, modes: Sequence[DecodeMode] = ("packed", "padded", "single")
) -> DecodeMode:
    """The first of the modes that gives this model's own logits; else "whole", which is the model's own forward pass.

    Holds for sequences up to `length_limit`. Raises CheckpointError where the model cannot be computed at all.
    """
    sequences = _sequences(model.get_input_embeddings().weight.shape[0])
    truths = [(runtime, _truth(model, runtime, sequences))]
    if runtime.precision == "bf16":
        # bf16 hides what a weak state does to a token, fp32 hides what other kernels do in bf16: both must agree.
        exact = replace(runtime, precision="fp32")
        with suppress(CheckpointError):  # in the middle of training the weights may be bf16 copies: no fp32 to be had
            truths.insert(0, (exact, _truth(model, exact, sequences)))
    for mode in modes:
        if all(_holds(model, each, mode, sequences, truth) for each, truth in truths):
            return mode
    return "whole"


def find_short_cuts(model: Any, runtime: Runtime) -> tuple[Forwards, LlamaStep | None]:
    """(layers with the functions that compute them faster, what computes a step faster), for mode "packed"; both only
    where they give this model's own logits."""
    if runtime.precision != "fp32" or not may_order(model):
        return [], None
    sequences = _sequences(model.get_input_embeddings().weight.shape[0])
    truth = _truth(model, runtime, sequences)
    step = step_of(model)
    if step is not None and _holds(model, runtime, "packed", sequences, truth, step.forwards, step):
        return step.forwards, step
    forwards = ordered_forwards(model)
    return (forwards if _holds(model, runtime, "packed", sequences, truth, forwards) else []), None


def _sequences(vocabulary: int) -> list[list[int]]:
    """Three of different length: all begin with the same HELD tokens, the first two with three more."""
    draw = np.random.default_rng(0).integers
    shared_prefix = draw(0, vocabulary, HELD).tolist()
    first, second, third = ([*shared_prefix, *draw(0, vocabulary, n).tolist()] for n in (9, 4, 6))
    second[HELD : HELD + 3] = first[HELD : HELD + 3]
    return [first, second, third]


def _truth(model: Any, runtime: Runtime, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each sequence's logits by the model's own forward pass.   Raises CheckpointError."""
    with attending(model, "eager"), short_windows(model), torch.inference_mode(), runtime.autocast():
        try:
            return [own_logits(model, ids) for ids in sequences]
        except BROKEN as error:
            name = type(model).__name__
            fact = f"{name} cannot compute a sequence ({type(error).__name__}: {first_line(error)})"
            raise CheckpointError(
                model.name_or_path or "model", fact, "copy the checkpoint again, save it in one dtype, or give another"
            ) from error


def _holds(
    model: Any,
    runtime: Runtime,
    mode: DecodeMode,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[torch.Tensor],
    forwards: Forwards | None = None,
    next_step: LlamaStep | None = None,
) -> bool:
    with short_windows(model):
        try:
            shared = sequences[0][:HELD]
            decoder = make_decoder(mode, model, runtime, shared_prefix=shared, forwards=forwards, next_step=next_step)
            gap = _gap(decoder, sequences, wanted)
            if mode == "packed" and forwards is None and sees_neighbours(model):
                return False  # a weak state, as a fresh model's, hides below any tolerance
        except BROKEN:
            return False
    tolerance = BF16 if runtime.precision == "bf16" else EXACT if runtime.device == "cpu" else COARSE
    if next(model.parameters()).dtype != torch.float32:
        tolerance = BF16
    return gap <= tolerance * max(float(w.nan_to_num().abs().max()) for w in wanted)


@torch.inference_mode()
def _gap(decoder: Decoder, sequences: Sequence[Sequence[int]], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit, when sequences of different length start together, and, where the decoder can
    do that, one joins the others while they run; then one leaves, the others change places and go on."""
    try:
        rows = [0, 1] if decoder.can_refill else [0, 1, 2]
        known = [len(s) - 3 for s in sequences]
        gap = _worst(decoder.add([sequences[i][: known[i]] for i in rows]), rows, known, wanted)

        def step() -> float:
            tokens = [sequences[i][known[i]] for i in rows]
            for i in rows:
                known[i] += 1
            return _worst(decoder.step(tokens), rows, known, wanted)

        gap = max(gap, step())
        if decoder.can_refill:
            gap = max(gap, _worst(decoder.add([sequences[2][: known[2]]]), [2], known, wanted))
            rows = [*rows, 2]
        gap = max(gap, step())
        decoder.keep([2, 0])
        rows = [2, 0]
        return max(gap, step())
    finally:
        decoder.close()


def _worst(logits: torch.Tensor, rows: Sequence[int], known: Sequence[int], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit. NaN and infinity are made numbers on both sides, so that a model with broken
    weights passes like any other: what is asked here is whether the decoder computes what the model does."""
    right = torch.stack([wanted[i][known[i] - 1] for i in rows])
    return float((logits.nan_to_num() - right.nan_to_num()).abs().max())
