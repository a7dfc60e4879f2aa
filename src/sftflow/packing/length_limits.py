"""Models whose hidden state at a token depends on the length of the whole sequence, and from what length on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from sftflow.packing.attending import changed

FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""rotary embeddings whose frequencies are the same for every sequence length"""


def length_limit(model: Any) -> tuple[int, str] | None:
    """(tokens, reason): the longest sequence in which the hidden state at a token depends on the tokens before it and
    on nothing else; None where that holds for any length.

    In longer ones the length itself plays a part: dynamic rotary scaling, say, turns every position by other angles
    once the whole sequence exceeds the trained length. Computing such a sequence packed, with a cache, or beside others
    then gives other numbers than computing it alone, and checks on short sequences do not show it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    varying = {r.get("rope_type", "default") for r in layers} - FIXED_ROPE
    original = [r.get("original_max_position_embeddings") for r in layers]
    original += [getattr(config, "original_max_position_embeddings", None)]
    rotary = max([n for n in original if n], default=0) or getattr(config, "max_position_embeddings", None)
    limits = {
        "its attention goes in chunks": getattr(config, "attention_chunk_size", None),
        "its attention picks keys": getattr(config, "index_topk", None),
        f"its rotary embedding ({', '.join(sorted(varying))}) changes": rotary if varying else None,
    }
    return min(((n, why) for why, n in limits.items() if n), default=None)


def short_windows(model: Any, size: int = 4) -> AbstractContextManager[None]:
    """While it lasts, attention that looks back over a window looks back over `size` tokens at most.

    So a proof on a dozen tokens sees what a model does about its window of thousands: where the mask that the model
    makes and the window that its attention is told of are not the same, as in Phimoe, the difference shows. Windows
    stand in the configuration, and layers may have copied them from there.
    """
    holders = {id(h): h for module in model.modules() for h in (module, getattr(module, "config", None))}
    return changed(
        (holder, name, size)
        for holder in holders.values()
        if holder is not None
        for name, value in vars(holder).items()
        if "window" in name and type(value) is int and value > size and name != "max_window_layers"
    )
