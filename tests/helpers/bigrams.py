"""A model whose likeliest next token is decided by the last one alone, so that a test can write its replies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def bigrams(n_tokens: int, *chains: Sequence[int]) -> Any:
    """A Qwen2 model that follows the chains of ids, the last of each on and on; other ids repeat themselves.

    Its layers add nothing: the embedding of an id is a unit vector, and the head's row for the next id is the same one.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    after = {a: b for chain in chains for a, b in pairwise(chain)}
    width = (n_tokens + 31) // 32 * 32
    config = Qwen2Config(
        vocab_size=n_tokens, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        for i in range(n_tokens):
            model.model.embed_tokens.weight[i, i] = 1.0
            model.lm_head.weight[after.get(i, i), i] = 1.0
    return model


def write_checkpoint(directory: Path, model: Any, tokenizer: Any) -> Path:
    """As transformers saves both; generation_config.json is left to the test."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    return directory
