"""The files of an adapter: which directory is one, the base that it names, its config and weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from sftflow.checkpoint.hub import is_hub_id
from sftflow.checkpoint.weights import no_weights, unreadable
from sftflow.foundation.atomic_io import read_record
from sftflow.foundation.errors import CheckpointError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
COPY_AGAIN = "copy the adapter again"
RESTORE = f"restore it, or {COPY_AGAIN}"


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter. Raises CheckpointError where it holds a whole model, too: some programs
    would load the one, some both."""
    if not (directory / CONFIG).is_file():
        return False
    whole = sorted(p.name for p in directory.glob("model*.safetensors*"))
    if whole:
        raise CheckpointError(str(directory), f"it holds a model ({whole[0]}) and an adapter", "keep them apart")
    return True


def has_tokenizer(directory: Path) -> bool:
    """Whether an adapter brings a tokenizer; else its base's is meant. Raises CheckpointError for half of one."""
    if any((directory / name).is_file() for name in TOKENIZERS):
        return True
    if (directory / "chat_template.jinja").is_file():
        raise CheckpointError(str(directory), "it brings a chat template, but no tokenizer", "copy tokenizer.json, too")
    return False


def base_name(directory: Path) -> str:
    """The base that an adapter names; "" where it names none.

    A path counts from the working directory, as in peft, else from the adapter's or the folder that holds it. Where the
    adapter's record has the base's hash, so that another model would be found out, it is looked for in every folder
    above, too, and a path that is gone also by its last names: folders may have moved together.
    """
    config = read_record(directory / CONFIG, RESTORE)
    name = str(config.get("base_model_name_or_path") or "")
    if not name or Path(name).expanduser().exists():
        return name
    folders, names = [directory, directory.parent], [name]
    if recorded_base(directory).get("body"):
        folders = [directory, *directory.resolve().parents]
        names += [] if is_hub_id(name) else ["/".join(Path(name).parts[n:]) for n in range(1, len(Path(name).parts))]
    for folder in (folder / part for part in names for folder in folders):
        if folder.exists():
            return str(folder)
    revision = config.get("revision")
    return f"{name}@{revision}" if revision and "@" not in name and is_hub_id(name) else name


def names_another_base(directory: Path, sha256: str) -> bool:
    """Whether an adapter's config is what was saved with this hash but for the base that it names: that may move."""
    config = read_record(directory / CONFIG, RESTORE)
    config["base_model_name_or_path"] = recorded_base(directory).get("name")
    return hashlib.sha256(json.dumps(config, indent=2, sort_keys=True).encode()).hexdigest() == sha256


def recorded_base(directory: Path) -> dict[str, Any]:
    """What the record of an adapter that was trained here says of its base; {} for another's."""
    path = directory / "sftflow.json"
    return (read_record(path, RESTORE).get("base") or {}) if path.is_file() else {}


def read_weights(directory: Path, name: str) -> dict[str, Any]:
    """The adapter's tensors by their keys."""
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(name, *no_weights(directory, WEIGHTS, "adapter"))
    try:
        weights: dict[str, Any] = load_file(path)
    except Exception as error:  # of many kinds
        raise CheckpointError(str(path), *unreadable(path, error, COPY_AGAIN)) from error
    if not weights:
        raise CheckpointError(str(path), "it holds no weights", "save the adapter again, or copy it again")
    for key, weight in weights.items():
        if not bool(weight.float().isfinite().all()):
            raise CheckpointError(name, f"its weights are not finite ({key})", "give another adapter")
    return weights


def read_config(directory: Path, name: str) -> Any:
    """peft's config of the adapter. Raises CheckpointError for what cannot be merged, or asks for what this peft does
    not know."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    raw = read_record(directory / CONFIG, RESTORE)
    kind, update = raw.get("peft_type"), "pip install -U peft"
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise CheckpointError(name, f"peft {peft.__version__} knows no adapter of type {kind!r}", update)
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(name, f"it was trained for {raw['task_type']}", "give an adapter for CAUSAL_LM")
    names = {f.name for f in fields(known)} | {"auto_mapping", "runtime_config"}
    # What is off, or a number beside something that is off, changes nothing.
    asked = [key for key, value in raw.items() if key not in names and value and isinstance(value, bool | list | dict)]
    if asked:
        raise CheckpointError(name, f"it asks for {asked[0]}, which peft {peft.__version__} does not know", update)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = known.from_pretrained(str(directory))
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{name}/{CONFIG}", f"cannot be read ({first_line(error)})", RESTORE) from error
    if config.is_prompt_learning or config.is_adaption_prompt or getattr(config, "alora_invocation_tokens", None):
        kind = "aLoRA" if hasattr(config, "alora_invocation_tokens") else kind
        raise CheckpointError(name, f"an adapter of type {kind} cannot be merged", "use it with peft")
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith(("pissa_niter", "corda", "lora_ga")):
        fact = f"at its start ({start}) the base was changed, at random or by data, and no file has that change"
        raise CheckpointError(name, fact, "save it again with path_initial_model_for_weight_conversion")
    config.inference_mode = True
    return config
