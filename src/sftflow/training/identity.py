"""What a run is made of, so that it is resumed only with the same: contents, never paths.

    {"recipe.train.lr": "0.008", ..., "base: config.json: rms_norm_eps": "1e-05", ..., "base: weights": HASH,
     "tokenizer": HASH, "chat format": HASH, "rows of source 1 (data.jsonl)": HASH}

What stands in brackets at the end of a key says where it was, and does not count: a folder may move.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftflow.chat.format import tokenizer_json
from sftflow.chat.render import Renderer
from sftflow.data.shares import shares_out
from sftflow.fingerprint import StoredRows, hash_json, rows_digest
from sftflow.recipe import HeldOut, Recipe, SourceEntry

Identity = dict[str, str]

# What may differ when a run is resumed: these decide what is written, not the weights that are trained.
FREE_OF_TRAIN = {"out", "save_every", "keep", "best", "logger", "shard"}
FREE_TO_CHANGE: dict[str, Any] = {"eval": True, "compare": True, "max_dropped": True, "train": FREE_OF_TRAIN}
# Keys of a config that no weight and no reply hangs on: where it lies, who wrote it, how it starts, what it is called.
SILENT = {"architectures", "dtype", "id2label", "initializer_range", "label2id", "torch_dtype", "transformers_version"}
SILENT |= {"use_cache"}
MOST_NAMED = 8

PATHS = re.compile(r"recipe\.(base|mixture\[\d+\]\.(source|path|name))")  # recorded by earlier versions


def run_identity(recipe: Recipe, base: Identity, renderer: Renderer, sources: Sequence[StoredRows]) -> Identity:
    """recipe: a resolved one.   base: see `base_identity`.   sources: the rendered rows of each mixture entry."""
    out, chat_format = recipe_identity(recipe) | base, renderer.format
    out["tokenizer"] = hash_json(tokenizer_json(renderer.tokenizer))
    out["special tokens"] = json.dumps([dict(sorted(renderer.spec.names.items())), sorted(renderer.stop_ids())])
    out["chat format"] = hash_json([chat_format.templates, chat_format.kwargs, chat_format.now])
    for number, rows in enumerate(sources, 1):
        out[f"rows of source {number} ({rows.meta['prefix']})"] = rows_digest(rows)
    return out


def recipe_identity(recipe: Recipe) -> Identity:
    """The recipe's keys but its paths: what lies there counts, and stands beside them. A source's name is kept where it
    decides which of its rows are held out, or drawn."""
    kept = recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE | {"base": True})
    entries = kept["mixture"] + (kept["validation"]["files"] if isinstance(recipe.validation, HeldOut) else [])
    for entry, data in zip(recipe.sources, entries, strict=True):
        data.pop("path")
        data["repeat"] = entry.repeat or 1  # beside a share the two differ in what is refused only
        if not entry.has_bare_name:
            data.pop("source")
            data["name"] = entry.label if recipe.held_out_share or shares_out(recipe) else None
    if recipe.format.endswith(".jinja"):
        kept.pop("format")
    return dict(flattened(kept, "recipe"))


def asked_for(recipe: Recipe) -> str:
    """A hash of an unresolved recipe as it was written, paths and all: of the same one, only what lies there
    can have changed."""
    return hash_json(recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE, exclude_defaults=True))


def base_identity(model: Any, dtype: Any, weights: str) -> Identity:
    """Of a base as it was loaded, before it is trained: all that its function, and what is saved of it, depend on.

    dtype: what its weights are stored in.   weights: their hash.
    """
    out = {"base: weights": weights, "base: stored as": str(dtype).removeprefix("torch.")}
    for name, config in (("config.json", model.config), ("generation_config.json", model.generation_config)):
        if config is not None:
            out |= flattened(_speaking(config.to_dict()), f"base: {name}: ", join="")
    return out


def _speaking(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that are SILENT or private, in its parts, too."""
    return {
        key: _speaking(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in SILENT and not str(key).startswith("_")
    }


def flattened(value: Any, path: str, join: str = ".") -> Iterable[tuple[str, str]]:
    """Every leaf of a JSON value by its path; an empty list or object is a leaf.

    >>> list(flattened({"train": {"lr": 0.008}, "mixture": ["a"]}, "recipe"))
    [('recipe.train.lr', '0.008'), ('recipe.mixture[0]', '"a"')]
    """
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{path}{join}{key}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from flattened(inner, f"{path}[{number}]")
    else:
        yield path, json.dumps(value, default=str)


# ---- what has changed


def told_changes(was: Identity, now: Identity, otherwise: str) -> str:
    """What differs, as one fact: "" where nothing does.   otherwise: how changes of all but the base are introduced."""
    changes = changed(was, now)
    of_base = [change.removeprefix("base: ") for change in changes if change.startswith("base: ")]
    others = [change for change in changes if not change.startswith("base: ")]
    told = ((otherwise, others), ("the base changed", of_base))
    return ", and ".join(f"{what}: {', '.join(_first(which))}" for what, which in told if which)


def _first(changes: list[str]) -> list[str]:
    more = len(changes) - MOST_NAMED
    return changes if more <= 0 else [*changes[:MOST_NAMED], f"and {more} more"]


def changed(was: Identity, now: Identity) -> list[str]:
    """What differs, a piece a key, in the order of the keys:

    {"recipe.train.lr": "0.008", ...}, {"recipe.train.lr": "0.004", ...}  ->  ["recipe.train.lr: 0.008 -> 0.004"]

    A key that only one of the two has counts, except where it says nothing: an earlier version of ours, or of
    transformers, may not have known it.
    """
    before, after = ({_bare(key): value for key, value in side.items()} for side in (was, now))
    named = {_bare(key): key for key in [*was, *now]}
    return [
        f"{named[key]}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key, "null") != after.get(key, "null")
        and ((key in before and key in after) or not _says_nothing(key, before, after))
    ]


def _bare(key: str) -> str:
    return re.sub(r" \(.*\)$", "", key)


def _says_nothing(key: str, before: Identity, after: Identity) -> bool:
    """Whether a key that only one side has is one that the other side could not have: of an earlier version."""
    if key in before:
        gone = bool(PATHS.fullmatch(key)) or before[key].endswith('.jinja"')
        return gone or (key.startswith("base: config.json: ") and _kind(key) not in map(_kind, after))
    if key.startswith("recipe."):
        return after[key] == _defaults().get(re.sub(r"\[\d+\]", "[0]", key))
    return _kind(key) not in map(_kind, before)


def _kind(key: str) -> str:
    """
    >>> _kind("base: config.json: rope_parameters.rope_theta"), _kind("rows of source 3")
    ('base: config.json: rope_parameters', 'rows of source')
    """
    found = re.match(r"base: config\.json: \w+|base: |rows of source|.+", key)
    return found[0] if found else key


def _defaults() -> Identity:
    """The recipe's keys where they are left out."""
    return recipe_identity(Recipe(mixture=(SourceEntry(source="task"),)))
