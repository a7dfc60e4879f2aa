"""Weights from files into a model, with every parameter and every tensor accounted for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sftflow.foundation.atomic_io import read_record
from sftflow.foundation.errors import CheckpointError, RunError, first_line

log = logging.getLogger("sftflow.checkpoint")

COPY_AGAIN = "copy the checkpoint again"
RESTORE = f"restore it, or {COPY_AGAIN}"  # of a file that somebody may have edited
WRAPPERS = ("_orig_mod.", "module.")
"""what torch.compile and DistributedDataParallel write into the names of a model that is saved inside them"""
_TABLES = re.compile(
    r"(inv_freq|(cos|sin)_cached|(attn|attention)\.(masked_)?bias|causal_mask|position_ids|embed_positions\.weights)$"
)
"""names of tables that models compute by themselves; earlier versions of transformers saved them"""
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.+)")
_MODALITIES = ("text_config", "vision_config", "audio_config", "speech_config", "image_config", "video_config")


def load_weights(directory: Path, name: str) -> Any:
    """The causal LM of a directory, in fp32 on the CPU.   name: the checkpoint's, as the user knows it.

    What the files hold decides whether the output head is the embedding; the model's config then says so. Raises
    CheckpointError naming tensors where the files do not hold the model's parameters, each once, and nothing else.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = read_record(directory / "config.json", RESTORE)
    stored = stored_types(directory, name)
    require_scales(stored, name) if config.get("quantization_config") else require_experts(stored, name)
    wrappers = {w: rf"\b{re.escape(w)}" for w in WRAPPERS if stored and all(f".{w}" in f".{key}" for key in stored)}
    if wrappers:
        log.warning("note: %s: %s in its tensors' names is read away", name, " and ".join(wrappers))
    parsed = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if parsed._attn_implementation not in (None, "eager", "sdpa"):
        parsed._attn_implementation = (
            None  # flash attention, as it was trained: not needed to read it, nor there perhaps
        )
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        config=parsed,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # `require_whole` refuses them, by name
        output_loading_info=True,
        key_mapping=dict.fromkeys(wrappers.values(), ""),
    )
    # What was read away is not to be written back on saving.
    model._weight_conversions = [c for c in model._weight_conversions if c.source_patterns[0] not in wrappers.values()]
    if config.get("quantization_config") and not getattr(model.config, "quantization_config", None):
        model._weight_conversions = None  # nor is what was de-quantised to be written as if it were quantised
    # transformers reads a body's name with and without the prefix, and of two tensors silently one.
    twice = [k for k in stored if f"{model.base_model_prefix}.{k}" in stored and k not in model.state_dict()]
    if twice:
        fact = f"one tensor under two names, {twice[0]} and {model.base_model_prefix}.{twice[0]}"
        raise CheckpointError(name, fact, "save it again under one of them")
    if not config.get("quantization_config"):
        integers = {key for key, kind in stored.items() if kind[0] in "IUB" and kind != "BF16"}
        require_floats(model, integers - report["unexpected_keys"], name)
    require_whole(model, report, name, multimodal=any(isinstance(config.get(key), dict) for key in _MODALITIES))
    settle_head(model)
    return model


def weight_files(directory: Path, name: str) -> list[Path]:
    """The files of the weights: model.safetensors, or the shards of its index.

    Raises CheckpointError where there are none, or a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not index.is_file():
        raise CheckpointError(name, *no_weights(directory, "model.safetensors"))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [directory / shard for shard in shards]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(str(index), "not a shard index", COPY_AGAIN) from None
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{name}/{file.name}", "this shard is missing", COPY_AGAIN)
    return files


def no_weights(directory: Path, wanted: str, what: str = "checkpoint") -> tuple[str, str]:
    """(fact, remedy) of a directory without the file that is wanted."""
    fact = f"no {wanted} in it"
    shards = sorted(p.name for p in directory.glob("model-*-of-*.safetensors"))
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(kind))
    if shards:
        return f"{shards[0]} is there, and not model.safetensors.index.json, which lists the shards", COPY_AGAIN
    if others:
        return f"{fact}, but {others[0]}", "save it as transformers does: model.save_pretrained(...)"
    if pickled:
        remedy = "pickled weights are not loaded; convert them to safetensors: model.save_pretrained(...)"
        return f"{fact}, but {pickled[0]}", remedy
    return f"{fact}: no weights at all", f"copy the whole {what}, or give one with weights"


def unreadable(path: Path, error: Exception, remedy: str) -> tuple[str, str]:
    """(fact, remedy) of weights that the safetensors library does not read."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the weights", "get the file itself: git lfs pull"
    return f"damaged, or no safetensors file ({first_line(error)})", remedy


def stored_types(directory: Path, name: str) -> dict[str, str]:
    """Each stored tensor's type by its name, from the files' headers: {"model.norm.weight": "BF16", ...}.

    Raises CheckpointError naming a tensor that stands in two shards: one of the two would be lost.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    for path in weight_files(directory, name):
        try:
            with safe_open(path, framework="pt") as file:
                types = {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118  (no dictionary)
        except SafetensorError as error:
            if "header" not in str(error):
                raise
            raise CheckpointError(f"{name}/{path.name}", *unreadable(path, error, COPY_AGAIN)) from None
        if both := sorted(found.keys() & types.keys()):
            remedy = "copy the checkpoint into an empty folder, or remove the shards of another save"
            raise CheckpointError(name, f"{both[0]} stands in two of its shards", remedy)
        found |= types
    return found


def require_experts(stored: Iterable[str], name: str) -> None:
    """Raises CheckpointError naming a tensor that one of several experts lacks: transformers puts together those that
    are there, in the order of their numbers, whatever these are."""
    numbers: dict[str, dict[str, set[int]]] = {}
    for key in stored:
        if found := _EXPERT.fullmatch(key):
            numbers.setdefault(found[1], {}).setdefault(found[3], set()).add(int(found[2]))
    for experts, parts in numbers.items():
        every = range(1 + max(max(there) for there in parts.values()))
        for part, there in parts.items():
            if lacking := sorted(set(every) - there):
                raise CheckpointError(name, f"{experts}{lacking[0]}.{part} is missing", COPY_AGAIN)


def require_scales(stored: dict[str, str], name: str) -> None:
    """Raises CheckpointError naming a tensor of 8-bit floats without its scale: it would be read as if that were 1."""
    for key, kind in stored.items():
        beside = key.removesuffix("weight")
        names = {f"{key}_scale_inv", f"{key}_scale", f"{beside}scale", f"{beside}qscale_weight"}
        if kind.startswith("F8") and "scale" not in key and not names & stored.keys():
            raise CheckpointError(name, f"{key} is stored as {kind}, and its scale is missing", COPY_AGAIN)


def require_floats(model: Any, integers: Iterable[str], name: str) -> None:
    """Raises CheckpointError where a weight is stored as integers: a quantised one, whose scale would be ignored, or a
    damaged header. Tables are no weights, nor is what the model keeps as integers, or leaves out.   (A checkpoint whose
    config says how it is quantised is transformers' to read.)"""
    kept = {buffer for buffer, _ in model.named_buffers()}
    left_out = model._keys_to_ignore_on_load_unexpected or ()
    for key in sorted(integers):
        is_table = _TABLES.search(key) or any(re.search(pattern, key) for pattern in left_out)
        if not is_table and not any(buffer.endswith(key) for buffer in kept):
            fact = f"{key} is stored as integers, and config.json says nothing of a quantisation"
            raise CheckpointError(name, fact, "give the checkpoint in fp32, bf16 or fp16")


def require_whole(model: Any, report: dict[str, Any], name: str, *, multimodal: bool = False) -> None:
    """Raises CheckpointError naming what is missing, has another shape, or has no place in the model.

    report: transformers' loading info. What its model class itself ignores, and heads that are the embedding, are not
    in it.   multimodal: the towers beside the text model may be left unread, which is said.
    """
    kind = type(model).__name__
    for key, there, wanted in sorted(report["mismatched_keys"]):
        fact = f"{key} is {_shape(there)}, where config.json asks for {_shape(wanted)}"
        raise CheckpointError(name, fact, f"{COPY_AGAIN}, with the config.json of this model")
    weights = {key for key, _ in model.named_parameters()}
    missing = sorted(key for key in report["missing_keys"] if key in weights or not _TABLES.search(key))
    unknown = sorted(key for key in report["unexpected_keys"] if not _TABLES.search(key))
    if missing:
        fact = f"{len(missing)} of the {len(model.state_dict())} tensors of {kind} are missing: {_some(missing)}"
        remedy = COPY_AGAIN
        if unknown:
            fact += f" (and it has {_some(unknown)})"
            remedy = "rename its tensors as transformers saves them, or copy the checkpoint again"
        elif missing == ["lm_head.weight"]:
            remedy = f"{COPY_AGAIN}; where the head is the embedding, tie_word_embeddings in config.json must be true"
        raise CheckpointError(name, fact, remedy)
    ahead = [key for key in unknown if _predicts_ahead(model.config, key)]
    if ahead:
        log.warning("note: %s: its layers that predict further ahead are not read", name)
        unknown = [key for key in unknown if key not in ahead]
    if unknown and multimodal:
        own = {part for key in model.state_dict() for part in key.split(".")[:2]}
        towers = {key: re.sub(r"^model\.", "", key).split(".")[0] for key in unknown}
        beside = sorted(set(towers.values()) - own)
        unknown = [key for key in unknown if towers[key] not in beside]
        if not unknown:
            log.warning("note: %s: its text model is meant; not read: %s", name, ", ".join(beside))
    if unknown:
        fact = f"{kind} has no place for {len(unknown)} of its tensors: {_some(unknown)}"
        raise CheckpointError(name, fact, "save it without them, or give the config.json that they belong to")


def _predicts_ahead(config: Any, key: str) -> bool:
    """Whether a tensor is of the layers for multi-token prediction, which DeepSeek-V3 and its like store behind the
    last of the model's own, and transformers does not have."""
    own, extra = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", 0)
    layer = re.search(r"\blayers\.(\d+)\.", key)
    return layer is not None and own <= int(layer[1]) < own + (extra or 0)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def settle_head(model: Any) -> None:
    """Make the config say of the output head what is the case: the embedding's weights, or weights of its own."""
    head = model.get_output_embeddings()
    if head is None:
        return
    tied = head.weight is model.get_input_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied


def distinct_weights(model: Any) -> dict[str, Any]:
    """The model's tensors by name, each once: an output head that is the embedding is left out."""
    state: dict[str, Any] = dict(model.state_dict())
    seen: set[int] = set()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            state.pop(key, None)
        seen.add(id(parameter))
    return state


def not_finite(model: Any) -> str | None:
    """The name of the first weight with a NaN or an infinity in it: all that comes of it is NaN, too."""
    import torch

    for key, weight in model.state_dict().items():
        if hasattr(weight, "to_local"):  # this rank's part of it
            weight = weight.to_local()
        # The ends are a NaN where there is one; `isfinite` on all of it takes six times as long.
        if weight.is_floating_point() and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
            return str(key)
    return None


def require_finite_weights(model: Any, name: str) -> None:
    """Raises RunError naming the first weight of a model in memory that is not finite."""
    which = not_finite(model)
    if which:
        raise RunError(name, f"its weights are not finite ({which})", "give another checkpoint, or copy it again")
