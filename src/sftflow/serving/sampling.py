"""How a checkpoint asks for its tokens to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant


class Sampling(TypedDict):
    """How tokens are drawn; temperature 0 is greedy; top_p 1, top_k 0, min_p 0 and repetition_penalty 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float


def own_sampling(assistant: Assistant) -> Sampling:
    """What the checkpoint's generation_config.json asks for, read as `generate` of transformers reads it: without
    do_sample it is greedy, and only the repetition penalty counts. Without a penalty either, as nearly all checkpoints
    are, that is how evaluation decodes, so that what one sees is what was measured."""
    config = getattr(assistant.model, "generation_config", None)

    def value(key: str, otherwise: float) -> float:
        found = getattr(config, key, None)
        return otherwise if found is None else float(found)

    drawn = bool(getattr(config, "do_sample", False))
    return {
        "temperature": value("temperature", 1.0) if drawn else 0.0,
        "top_p": value("top_p", 1.0) if drawn else 1.0,
        "top_k": int(value("top_k", 0)) if drawn else 0,
        "min_p": value("min_p", 0.0) if drawn else 0.0,
        "repetition_penalty": value("repetition_penalty", 1.0),
    }
