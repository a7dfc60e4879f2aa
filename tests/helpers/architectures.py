"""Random models of real transformers code, so small that a forward pass takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch

from sftflow.foundation.runtime import Runtime

FP32 = Runtime(device="cpu", precision="fp32", reason="test")


VOCABULARY = 320


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


WINDOW = {"head_dim": 16, "sliding_window": 6}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": SMALL | {"tie_word_embeddings": True},
    "Qwen2": SMALL,
    "Qwen3": SMALL | {"head_dim": 16},
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "Mistral": SMALL | {"sliding_window": 6},
    "Gemma2": SMALL | WINDOW | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "Gemma3Text": SMALL | WINDOW,
    "Olmo2": SMALL,
    "Phi3": SMALL,
    "SmolLM3": SMALL,
    "NanoChat": SMALL,
    "SftflowNanochat": SMALL | {"num_hidden_layers": 3, "sliding_window": 4, "long_window": 8, "backout_layer": 1},
    # not in the promise, but what people bring
    "Olmo3": SMALL | WINDOW,
    "Granite": SMALL | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Cohere2": SMALL | WINDOW | {"logit_scale": 0.25},
    "GPTNeoX": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "Starcoder2": SMALL,
}


REFUSED: dict[str, dict[str, Any]] = {
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def tiny(name: str, **settings: Any) -> Any:
    """settings: in place of those in the table."""
    import transformers

    from sftflow.nanochat import config as ours

    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config", None) or getattr(ours, f"{name}Config")
    config = kind(**(settings or ARCHITECTURES.get(name, REFUSED.get(name, {}))))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # NanoChat starts with zeros: nothing would be tested
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
            elif "lambda" in key:
                parameter.normal_(0.5, 0.3)
    return model


# What each of these remembers, and so how it may be decoded.
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("single", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "Mamba2": (
        "single",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "Rwkv": (
        "single",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "Jamba": (
        "single",
        SMALL
        | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
        | {"expert_layer_period": 2, "mamba_d_state": 4},
    ),
    "Bamba": (
        "single",
        SMALL
        | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
        | {"mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "Lfm2": ("single", SMALL | {"layer_types": ["conv", "full_attention"]}),
    # keeps its state inside the model, not in what it gives back
    "RecurrentGemma": (
        "whole",
        SMALL | {"attention_window_size": 8, "block_types": ["recurrent", "attention"], "lru_width": 32},
    ),
    # its mask has a window that its attention is not told of; longer than any short proof
    "Phimoe": ("padded", SMALL | {"num_local_experts": 4, "sliding_window": 64}),
}


def stateful(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**STATEFUL[name][1])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
