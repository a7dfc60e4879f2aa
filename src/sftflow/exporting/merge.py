"""`sftflow export ADAPTER --to merged`: a LoRA adapter added into its base, as a checkpoint like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from sftflow import checkpoint
from sftflow.exporting.target import require_replaceable
from sftflow.foundation.atomic_io import read_record
from sftflow.foundation.errors import CheckpointError, first_line

ADAPTER = "adapter_config.json"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def merge(name: str, out: Path, *, base: str | None = None, kind: str | None = None) -> None:
    """Write the merged checkpoint: whole or not at all. kind: how weights are stored; as in the base where None.

    Raises CheckpointError where `name` is no adapter, or its base cannot be found.
    """
    adapter = _adapter_directory(name)
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(name, "merging an adapter needs the package peft", "pip install 'sftflow[lora]'")
    config = read_record(adapter / ADAPTER, "copy the adapter again")
    require_replaceable(out, lambda: _is_ours(out, adapter), "a merged checkpoint", "folder")
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(name, "the adapter names no base", "name it with --base")
    try:
        location = checkpoint.resolve(base)
    except CheckpointError as error:
        raise CheckpointError(base, f"{error.fact} (the adapter's base)", "name the base with --base") from None
    model, info = checkpoint.load_model(location)
    has_tokenizer = (adapter / "tokenizer.json").is_file()  # tokens may have been added; else the base's is meant
    tokenizer_from = checkpoint.Location(str(adapter), str(adapter)) if has_tokenizer else location
    own = checkpoint.load_info(tokenizer_from)
    renderer = checkpoint.open_renderer(tokenizer_from, "auto")
    checkpoint.grow_embeddings(model, len(renderer.tokenizer))
    merged = _merged(model, adapter, name)
    import torch

    stored = DTYPES[kind] if kind else info.get("dtype") or getattr(checkpoint.load_config(location), "dtype", None)
    dtype = getattr(torch, stored) if isinstance(stored, str) else stored or torch.float32
    meta = {
        **{k: v for k, v in own.items() if k in ("lineage", "metrics")},
        "merged": {"adapter": str(name), "base": str(base), "peft_type": config.get("peft_type")},
    }
    checkpoint.save(out, merged, renderer.tokenizer, renderer, dtype=dtype, meta=meta)


def _adapter_directory(name: str) -> Path:
    path = Path(name)
    inside = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    if not (inside / ADAPTER).is_file():
        remedy = "a whole checkpoint needs no merging; use it as it is"
        raise CheckpointError(name, f"it is no adapter (no {ADAPTER} in it)", remedy)
    if not (inside / "adapter_model.safetensors").is_file():
        raise CheckpointError(name, "no adapter_model.safetensors in it", "pickled weights are not loaded")
    return inside


def _is_ours(out: Path, adapter: Path) -> bool:
    """Whether a directory may be replaced: it is empty, or holds a merged checkpoint of ours."""
    if out.is_dir() and not any(out.iterdir()):
        return True
    return "merged" in json.loads((out / "sftflow.json").read_text(encoding="utf-8")) and not out.samefile(adapter)


def _merged(model: Any, adapter: Path, name: str) -> Any:
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
        merged = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        fact = f"it does not fit this base ({first_line(error) or type(error).__name__})"
        raise CheckpointError(name, fact, "name the base it was trained on") from error
    merged.tie_weights()
    return merged
