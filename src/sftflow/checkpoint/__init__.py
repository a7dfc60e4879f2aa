"""Checkpoints: a Hugging Face directory plus `sftflow.json` (lineage, format, fingerprint, file hashes).

A model is named by a directory, a run directory (its `checkpoint/` is meant), a base directory of picollm or nanochat
(`nanochat/`), `builtin:tiny`, a .gguf file, or a hub id (`location.py`, `hub.py`). The directory of an adapter of peft
is its base with the adapter added (`adapter_files.py`, `adapters.py`). `weights.py` accounts for every tensor,
`tokenizer.py` keeps the tokenizer as its file has it, `assistant.py` makes a checkpoint talk, `saving.py` writes one
(`older_readers.py`: so that transformers 4 reads it).
"""

from sftflow.checkpoint.assistant import Assistant, assistant_of, base_format, load_assistant, prepare
from sftflow.checkpoint.loading import (
    load_config,
    load_info,
    load_merged,
    load_model,
    load_tokenizer,
    open_renderer,
    stored_dtype,
)
from sftflow.checkpoint.location import BUILTIN_TINY, Location, base_location, resolve
from sftflow.checkpoint.saving import require_own_names, save, save_adapter
from sftflow.checkpoint.weights import require_finite_weights

__all__ = [
    "BUILTIN_TINY",
    "Assistant",
    "Location",
    "assistant_of",
    "base_format",
    "base_location",
    "load_assistant",
    "load_config",
    "load_info",
    "load_merged",
    "load_model",
    "load_tokenizer",
    "open_renderer",
    "prepare",
    "require_finite_weights",
    "require_own_names",
    "resolve",
    "save",
    "save_adapter",
    "stored_dtype",
]
