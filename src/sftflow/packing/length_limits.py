"""Where a model computes a token differently by the length of what it stands in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""rotary embeddings whose frequencies do not hang on the length of what is computed"""


def length_bound(model: Any) -> tuple[int, str] | None:
    """(tokens, why): up to so many a token's state hangs on nothing but what stands before it; None: always.

    Beyond it the proofs on short sequences say nothing.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    varying = {r.get("rope_type", "default") for r in layers} - FIXED_ROPE
    original = [r.get("original_max_position_embeddings") for r in layers]
    original += [getattr(config, "original_max_position_embeddings", None)]
    rotary = max([n for n in original if n], default=0) or getattr(config, "max_position_embeddings", None)
    bounds = {
        "its attention goes in chunks": getattr(config, "attention_chunk_size", None),
        "its attention picks keys": getattr(config, "index_topk", None),
        f"its rotary embedding ({', '.join(sorted(varying))}) changes": rotary if varying else None,
    }
    return min(((n, why) for why, n in bounds.items() if n), default=None)


@contextmanager
def short_windows(model: Any, size: int = 4) -> Iterator[None]:
    """While it lasts, attention that looks back over a window looks back over `size` tokens at most.

    So a proof on a dozen tokens sees what a model does about its window of thousands: where the mask that the model
    makes and the window that its attention is told of are not the same, as in Phimoe, the difference shows. Windows
    stand in the configuration, and layers may have copied them from there.
    """
    holders: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if holder is not None:
                holders[id(holder)] = holder
    before = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if "window" in name and type(value) is int and value > size and name != "max_window_layers"
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, size)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
