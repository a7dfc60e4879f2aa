"""`sftflow export ADAPTER --to merged`: an adapter of peft added into its base, as a checkpoint like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftflow import checkpoint
from sftflow.checkpoint.adapters import TOLERANCE, Unmerged, require_near
from sftflow.checkpoint.saving import stored
from sftflow.exporting.target import require_replaceable
from sftflow.foundation.errors import CheckpointError, ProofError

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""by their names in files and on the command line"""


# Of the largest logit, three times what was measured and more: SmolLM2-135M bf16 0.012 and f16 0.002, on builtin:tiny
# 0.004 and 0.0004. It grows as the square root of the depth; a wrong weight makes 0.1 and more.
STORED = {"f32": TOLERANCE, "f16": 0.01, "bf16": 0.04}
"""how far the logits of what is stored may be from those of the adapter beside its base"""


def merge(name: str, out: Path, *, base: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """Write the merged checkpoint: whole or not at all. Vocabulary, chat template and generation config stay those of
    base and adapter.

    base: instead of the one that the adapter names.   kind: how weights are stored; as in the base where None.

    Returns what `merged` of its sftflow.json says: adapter and base, and how far its logits are from those that peft
    computes with the adapter beside the base: merged in fp32, and as stored.

    Raises CheckpointError where `name` is no adapter, or its base cannot be found, and what `load_merged` does;
    ProofError where what would be stored computes something else.
    """
    location = checkpoint.resolve(name)
    if location.adapter_of is None:
        remedy = "a whole checkpoint needs no merging; use it as it is"
        raise CheckpointError(name, "it is no adapter (no adapter_config.json in it)", remedy)
    location = replace(location, adapter_of=base or location.adapter_of)
    parts = (Path(location.path), Path(checkpoint.base_location(location).path))
    require_replaceable(out, lambda: _is_ours(out, parts), "a merged checkpoint", "folder")
    model, unmerged = checkpoint.load_merged(location)
    import torch

    dtype = getattr(torch, DTYPES[kind]) if kind else checkpoint.stored_dtype(location, of_gguf=torch.float32)
    kind = next(name for name, long in DTYPES.items() if long == str(dtype).removeprefix("torch."))
    merged: dict[str, Any] = {"adapter": str(name), "base": location.adapter_of, "type": kind}
    merged |= {"largest_logit": unmerged.largest, "moved_by_adapter": unmerged.moved}
    merged["merged_off_by"] = unmerged.off_by(model)
    _round(model, dtype)
    merged["stored_off_by"] = _require_kept(unmerged, model, kind, name)
    merged["bounds"] = {"merged": TOLERANCE * unmerged.largest, "stored": STORED[kind] * unmerged.largest}
    kept = ("base", "recipe", "kind", "format", "fingerprint")
    meta = {key: value for key, value in checkpoint.load_info(location).items() if key in kept}
    checkpoint.save(out, model, checkpoint.load_tokenizer(location), None, dtype=dtype, meta={**meta, "merged": merged})
    return merged


def told(merged: dict[str, Any]) -> str:
    """What a merge has cost, as one line."""
    bounds, kind = merged["bounds"], merged["type"]
    return (
        f"logits differ from the adapter's beside its base by at most {merged['merged_off_by']:.1e} merged in fp32 "
        f"(allowed {bounds['merged']:.1e}), {merged['stored_off_by']:.1e} stored as {kind} (allowed "
        f"{bounds['stored']:.1e}); the adapter moves them by up to {merged['moved_by_adapter']:.2g}"
    )


def _round(model: Any, dtype: Any) -> None:
    """Put in place of every weight what will be stored of it."""
    import torch

    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.copy_(stored(weight, dtype))


def _require_kept(unmerged: Unmerged, model: Any, kind: str, name: str) -> float:
    """The largest difference of a logit of what is stored. Raises ProofError where it is above its bound, or where
    rounding has changed more than the adapter did."""
    off, how = unmerged.off_by(model), f"stored as {kind}"
    require_near(unmerged, off, STORED[kind], name, how, "store it as f32: --type f32")
    if off > max(unmerged.moved, TOLERANCE * unmerged.largest):
        fact = f"{how}, its logits are off by {off:.1e}, and the adapter itself moves them by {unmerged.moved:.1e} only"
        raise ProofError(name, fact, "store it as f32: --type f32")
    return off


def _is_ours(out: Path, parts: tuple[Path, ...]) -> bool:
    """Whether a directory may be replaced: it is empty, or holds a merged checkpoint of ours, and none of its parts."""
    if out.is_dir() and not any(out.iterdir()):
        return True
    if any(part.exists() and out.samefile(part) for part in parts):
        return False
    return "merged" in json.loads((out / "sftflow.json").read_text(encoding="utf-8"))
