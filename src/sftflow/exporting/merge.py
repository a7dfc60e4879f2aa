"""`sftflow export ADAPTER --to merged`: an adapter of peft added into its base, as a checkpoint like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sftflow import checkpoint
from sftflow.exporting.target import require_replaceable
from sftflow.foundation.errors import CheckpointError

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""by their names in files and on the command line"""


def merge(name: str, out: Path, *, base: str | None = None, kind: str | None = None) -> None:
    """Write the merged checkpoint: whole or not at all. Vocabulary, chat template and generation config stay those of
    base and adapter.

    base: instead of the one that the adapter names.   kind: how weights are stored; as in the base where None.

    Raises CheckpointError where `name` is no adapter, or its base cannot be found, and what `load_model` does.
    """
    location = checkpoint.resolve(name)
    if location.adapter_of is None:
        remedy = "a whole checkpoint needs no merging; use it as it is"
        raise CheckpointError(name, "it is no adapter (no adapter_config.json in it)", remedy)
    location = replace(location, adapter_of=base or location.adapter_of)
    parts = (Path(location.path), Path(checkpoint.base_location(location).path))
    require_replaceable(out, lambda: _is_ours(out, parts), "a merged checkpoint", "folder")
    model, info = checkpoint.load_model(location)
    import torch

    dtype = getattr(torch, DTYPES[kind]) if kind else checkpoint.stored_dtype(location, of_gguf=torch.float32)
    kept = ("base", "recipe", "kind", "format", "fingerprint")
    meta = {key: value for key, value in info.items() if key in kept}
    meta["merged"] = {"adapter": str(name), "base": location.adapter_of}
    checkpoint.save(out, model, checkpoint.load_tokenizer(location), None, dtype=dtype, meta=meta)


def _is_ours(out: Path, parts: tuple[Path, ...]) -> bool:
    """Whether a directory may be replaced: it is empty, or holds a merged checkpoint of ours, and none of its parts."""
    if out.is_dir() and not any(out.iterdir()):
        return True
    if any(part.exists() and out.samefile(part) for part in parts):
        return False
    return "merged" in json.loads((out / "sftflow.json").read_text(encoding="utf-8"))
