"""A model's weights by their bytes: their fingerprint, and whether a NaN is among them or comes out of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from sftflow.errors import RunError


def weights_hash(model: Any) -> str:
    """SHA-256 over every weight's name, dtype, shape and bytes: the same on every device, with any number of threads,
    wherever the files came from. Tied weights are read once."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    own = {_place(weight): name for name, weight in reversed(weights.items())}  # the first name of each
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib lets other threads run
        names = sorted(own.values())
        of_bytes = dict(zip(names, pool.map(_bytes_hash, [weights[n] for n in names]), strict=True))
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        said = f"{name} {weight.dtype} {tuple(weight.shape)} {of_bytes[own[_place(weight)]]}\n"
        digest.update(said.encode())
    return digest.hexdigest()[:16]


def _place(weight: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if not weight.numel():
        return (weight.dtype, tuple(weight.shape))
    return (weight.device, weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride())


def _bytes_hash(weight: torch.Tensor) -> str:
    flat = weight.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()  # as bytes, for NumPy has no bf16


def require_finite_weights(model: Any, name: str) -> None:
    """Raises RunError naming the first weight with a NaN or an infinity in it."""
    for which, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise RunError(name, f"its weights are not finite ({which})", "give another checkpoint, or copy it again")


@contextmanager
def finite_logits(model: Any, name: str) -> Iterator[None]:
    """Raises RunError when the model's logits hold a NaN or +inf: what it says then means nothing."""

    def look(module: Any, given: Any, out: Any) -> None:
        # The maximum is NaN where any of them is. -inf is allowed: some models rule ids out by it.
        if not bool(out.logits.amax().isfinite()):
            raise RunError(name, "the model's logits are not finite", "give another checkpoint")

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
