"""Which architectures go into a GGUF file, and under which names and numbers llama.cpp looks for theirs.

A new architecture of the Llama family is one row of ARCHITECTURES. A config that asks for something its row does not
say (another activation, windowed attention, another rope scaling) is refused, because llama.cpp would compute
otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.foundation.errors import CheckpointError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture. arch: llama.cpp's name of it.

    interleaved: llama.cpp rotates neighbouring pairs (0,1), (2,3), .. where transformers rotates (0,d/2), (1,d/2+1), ..
        so the rows of query and key are put in that order.
    """

    arch: str
    interleaved: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(arch="llama", interleaved=True),
    "MistralForCausalLM": Architecture(arch="llama", interleaved=True),
    "SmolLM3ForCausalLM": Architecture(arch="smollm3", interleaved=True),
    "Qwen2ForCausalLM": Architecture(arch="qwen2"),
    "Qwen3ForCausalLM": Architecture(arch="qwen3"),
}

# transformers' name -> llama.cpp's; what a model lacks (biases, a head of its own) is not asked for.
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def layout_of(config: Any, place: str) -> Architecture:
    """The row for a transformers config. Raises CheckpointError naming what cannot be exported."""
    names = getattr(config, "architectures", None) or [type(config).__name__.replace("Config", "ForCausalLM")]
    name = str(names[0])
    if name not in ARCHITECTURES:
        raise CheckpointError(place, f"{name} cannot be exported to GGUF", f"these can: {', '.join(ARCHITECTURES)}")
    for problem in _problems(config, name):
        remedy = "llama.cpp would compute something else; serve the directory itself: sftflow serve"
        raise CheckpointError(place, f"this {name} {problem}", remedy)
    return ARCHITECTURES[name]


def _problems(config: Any, name: str) -> Iterator[str]:
    if config.hidden_act not in ("silu", "swish"):
        yield f"has the activation {config.hidden_act}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", name.startswith("Mistral")):
        yield f"attends to a window of {config.sliding_window} tokens"
    if getattr(config, "quantization_config", None):
        yield "is quantised"
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        yield f"has rope scaling of the kind {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "rotates a part of each head only"
    if name == "SmolLM3ForCausalLM":
        layers = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != layers:
            yield "leaves the rotation out elsewhere than in every fourth layer"


def rope_of(config: Any) -> dict[str, Any]:
    """The rope parameters: rope_type, rope_theta, and what the type needs."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    rope.setdefault("rope_type", "default")
    return rope


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """(head_dim / 2,) by what llama.cpp divides each pair's frequency; None where the frequencies are the plain ones.

    Taken from the frequencies that transformers computes, not from the formula.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = head_dim_of(config)
    plain = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    return (plain / scaled.double().numpy()).astype(np.float32)


def gguf_name(name: str) -> str | None:
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"; None for a name that is not of these layouts."""
    found = _LAYER.fullmatch(name)
    if found:
        inside = INSIDE.get(found[2])
        return f"blk.{found[1]}.{inside}.{found[3]}" if inside else None
    stem, _, kind = name.rpartition(".")
    return f"{OUTSIDE[stem]}.{kind}" if stem in OUTSIDE else None


def permuted(name: str, config: Any, layout: Architecture) -> int | None:
    """Into how many heads the rows of this tensor (transformers' name) are reordered, or None."""
    if not layout.interleaved:
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    if ".k_proj." in name:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return None


def interleave(rows: Array, heads: int) -> Array:
    """Rows of each head from halves to neighbouring pairs: [0 1 2 | 3 4 5] -> [0 3 1 4 2 5]."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separate(rows: Array, heads: int) -> Array:
    """The inverse of `interleave`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_shape(writer: Any, config: Any) -> None:
    """The numbers llama.cpp builds the model from. writer: a gguf.GGUFWriter."""
    import gguf

    size = head_dim_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
