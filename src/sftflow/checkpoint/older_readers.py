"""config.json in words that transformers 4 reads, too: serving programs bundle it, and it says nothing of keys that it
does not know.

    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}
    -> the same, and {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}

transformers 5 reads these as it reads its own (tests/test_older_readers.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FULL, LOCAL = "full_attention", "sliding_attention"
BY_LAYER: dict[str, str | None] = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
    "olmo3": None,
}
"""model types whose layers of local attention have a rope of their own, and what transformers 4 calls its wavelength"""
WAVES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
    "modernbert-decoder": ("global_rope_theta", "partial_rotary_factor"),
}
"""model types whose wavelength and rotated share have names of their own there"""
EXACTLY = {
    ("olmo", "linear"): ("factor",),
    ("olmo", "dynamic"): ("factor",),
    ("olmo2", "linear"): ("factor",),
    ("olmo2", "dynamic"): ("factor",),
    ("phi3", "longrope"): ("short_factor", "long_factor"),
}
"""(model type, type of a scaled rope) of which transformers 4 takes `type` and these, and nothing else"""
RENAMED = {"qwen3_moe": ("num_local_experts", "num_experts")}
LAYERS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
"""names of a model type's kinds of layers there; transformers 5 still reads them"""


def respell_config(directory: Path, **changes: Any) -> None:
    """Write the directory's config.json anew, with these values and in both spellings."""
    path = directory / "config.json"
    config = spell_config(json.loads(path.read_text(encoding="utf-8")) | changes)
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def spell_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 5 writes it -> the same with transformers 4's spellings beside."""
    kind = str(config.get("model_type"))
    both = dict(config)
    if "dtype" in config:
        both["torch_dtype"] = config["dtype"]
    new, old = RENAMED.get(kind, ("", ""))
    if new in config:
        both[old] = config[new]
    if kind in LAYERS and config.get("layer_types"):
        both["layer_types"] = [LAYERS[kind].get(layer, layer) for layer in config["layer_types"]]
    rope = config.get("rope_parameters")
    by_layer = any(isinstance(value, dict) for value in (rope or {}).values())
    if not rope or (by_layer and kind not in BY_LAYER):
        return both  # transformers 4 has no such model
    scaling = dict(rope.get(FULL) or {}) if by_layer else dict(rope)
    if by_layer and BY_LAYER[kind] and rope.get(LOCAL):
        both[str(BY_LAYER[kind])] = rope[LOCAL]["rope_theta"]
    wavelength, share = WAVES.get(kind, ("rope_theta", "partial_rotary_factor"))
    for name, key in ((wavelength, "rope_theta"), (share, "partial_rotary_factor")):
        if key in scaling:
            both[name] = scaling.pop(key)
    scaled = scaling.get("rope_type", "default")
    if scaled == "longrope" and "original_max_position_embeddings" in scaling:
        both["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if (kind, scaled) in EXACTLY:
        scaling = {"type": scaled, **{key: scaling[key] for key in EXACTLY[kind, scaled]}}
    both["rope_scaling"] = None if scaled == "default" else scaling
    return both
