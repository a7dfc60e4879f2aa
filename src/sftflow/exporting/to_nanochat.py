"""`sftflow export MODEL --to nanochat`: what was trained from a checkpoint of picollm or nanochat, as their own code
reads it: a base directory with the model and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftflow import checkpoint
from sftflow.chat.format import builtin_format
from sftflow.exporting.target import require_replaceable
from sftflow.foundation.atomic_io import write_directory
from sftflow.foundation.errors import CheckpointError
from sftflow.nanochat import weights
from sftflow.nanochat.files import RECORD
from sftflow.nanochat.vocabulary import encoding_of
from sftflow.nanochat.writer import write_base

MODELS = ("SftflowNanochatForCausalLM", "NanoChatForCausalLM")
KEPT = ("version", "base", "recipe", "data", "step", "kind")
"""of a record; the chat format is theirs, and the tokenizer is another file"""
_OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_nanochat(name: str, out: Path) -> Path:
    """Write the base directory, whole or not at all; returns the folder of the checkpoint in it.

    Weights are stored in fp32; an adapter is added into its base.

    Raises CheckpointError where their code would not have this model, or would write its conversations otherwise.
    """
    require_replaceable(out, lambda: _is_ours(out), "such an export", "folder")
    location = checkpoint.resolve(name)
    model_class = _class_of(checkpoint.load_config(location))
    if model_class not in MODELS:
        remedy = "only what was trained from a checkpoint of theirs can; others go to gguf, or are served as they are"
        raise CheckpointError(name, f"picollm and nanochat have no {model_class}", remedy)
    model, tokenizer, renderer, info = checkpoint.prepare(location)
    theirs = builtin_format("sftflow")
    if (renderer.format.template, renderer.format.named) != (theirs.template, {}):
        fact = f"its chat format is {renderer.format.name}, and picollm and nanochat know one: that of <|user_start|>"
        raise CheckpointError(name, fact, "train with format: sftflow")
    encoding = encoding_of(tokenizer)
    if encoding is None:
        fact = "its tokenizer is none that tiktoken has with the same ids"
        raise CheckpointError(name, fact, "give a model with the tokenizer of its base")
    state = weights.state_dict_of(model)
    meta = {
        "step": int(info.get("step") or 0),
        "model_config": weights.meta_of(model.config),
        "softcap": model.config.final_logit_softcapping,  # of no use to them: versions differ, and no file says by what
    }
    _require_same(model.config, weights.config_of(meta, state, name), name)
    stage = "chatsft_checkpoints" if info.get("kind") == "sft" else "base_checkpoints"
    record = {key: info[key] for key in KEPT if key in info}
    write_directory(out, lambda folder: write_base(folder, stage, state, meta, encoding, record))
    return out / stage / f"d{model.config.num_hidden_layers}"


def _class_of(config: Any) -> str:
    return str((config.architectures or [type(config).__name__.replace("Config", "ForCausalLM")])[0])


def _require_same(config: Any, again: Any, name: str) -> None:
    """Raises CheckpointError where the files would be read as a model of another shape."""
    for key in type(config).__annotations__.keys() - _OF_TOKENIZER:
        was, now = getattr(config, key), getattr(again, key)
        if was != now:
            fact = f"its {key} is {was!r:.80}, and in picollm and nanochat it is {now!r:.80}"
            raise CheckpointError(name, fact, "only what was trained from a checkpoint of theirs can be written so")


def _is_ours(out: Path) -> bool:
    """Whether a directory may be replaced: it is empty, or holds one export and nothing else."""
    files = [path for path in out.rglob("*") if path.is_file()]
    metas = [path for path in files if path.match("*_checkpoints/*/meta_*.json")]
    if len(metas) != 1:
        return out.is_dir() and not any(out.iterdir())
    ours = {metas[0], metas[0].with_name(metas[0].name.replace("meta_", "model_").replace(".json", ".pt"))}
    ours |= {out / "tokenizer" / name for name in ("tokenizer.pkl", "token_bytes.pt")}
    return set(files) == ours and RECORD in json.loads(metas[0].read_text(encoding="utf-8"))
