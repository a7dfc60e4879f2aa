"""What a run is made of, so that it is resumed only with the same: recipe, data, tokenizer, chat format."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sftflow.atomic_io import sha256_file
from sftflow.chat.format import tokenizer_json
from sftflow.data.mixture import Mixture
from sftflow.recipe import Recipe

# What may differ when a run is resumed: these decide what is written, not the weights that are trained.
FREE_TO_CHANGE = {"out", "save_every", "keep", "best", "logger"}


def identity_of(mixture: Mixture, tokenizer: Any) -> dict[str, str]:
    """The data, source by source, and what renders it, as short hashes."""
    chat_format = mixture.renderer.format
    text = json.dumps(tokenizer_json(tokenizer), sort_keys=True)
    rendering = json.dumps([chat_format.template, chat_format.kwargs, chat_format.now], sort_keys=True)
    out = {
        "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:16],
        "chat format": hashlib.sha256(rendering.encode()).hexdigest()[:16],
    }
    for number, rows in enumerate(mixture.rows, 1):
        digest = hashlib.sha256(rows.table["digest"].tobytes() + rows.table["supervised"].tobytes())
        digest.update(sha256_file(rows.directory / "mask.bin").encode())
        out[f"rows of source {number} ({rows.meta['prefix']})"] = digest.hexdigest()[:16]
    return out


def flat_recipe(recipe: Recipe) -> dict[str, str]:
    """What decides the weights, as `recipe.train.lr: 0.008`, so that a change is named by its key on resume."""
    kept = recipe.model_dump(mode="json", exclude={"eval": True, "compare": True, "train": FREE_TO_CHANGE})
    out: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list) and value:
            for number, inner in enumerate(value):
                walk(inner, f"{path}[{number}]")
        else:
            out[path] = json.dumps(value)

    walk(kept, "recipe")
    return out
