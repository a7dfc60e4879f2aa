"""What a model's name means: a directory, a run, an adapter of one, what picollm saves, a .gguf file, a hub model."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftflow.checkpoint import adapter_files as adapters
from sftflow.checkpoint import hub
from sftflow.foundation.atomic_io import recover_directory
from sftflow.foundation.errors import CheckpointError
from sftflow.foundation.missing import not_there
from sftflow.nanochat.files import Files, files_of

log = logging.getLogger("sftflow.checkpoint")

BUILTIN_TINY = "builtin:tiny"


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's files are. path: a directory; gguf: file name inside it.

    nanochat: of a checkpoint of picollm or nanochat, its files.
    from_hub: whether the directory is the hub library's copy of model `name`, whose weights come when asked for.
    adapter_of: of an adapter's directory, the name of its base; "" where it names none.
    """

    name: str
    path: str
    gguf: str | None = None
    nanochat: Files | None = None
    from_hub: bool = False
    adapter_of: str | None = None

    @property
    def file(self) -> Path:
        """The .gguf file; model_*.pt of picollm or nanochat."""
        return self.nanochat.model if self.nanochat else Path(self.path) / str(self.gguf)

    @property
    def load_args(self) -> dict[str, Any]:
        """Code that a checkpoint brings is never run, and never asked about."""
        return {"trust_remote_code": False, **({"gguf_file": self.gguf} if self.gguf else {})}


def resolve(name: str) -> Location:
    """Find the files behind a model's name: what exists here is a path, else OWNER/NAME[@REVISION] is asked of the hub.

    Raises CheckpointError where there are none.
    """
    if name == BUILTIN_TINY:
        return Location(name, str(Path(__file__).parents[1] / "pretraining" / "tiny"))
    if name.startswith("builtin:"):
        raise CheckpointError(name, "no such built-in base", f"use {BUILTIN_TINY}")
    path = Path(name).expanduser()
    if not name.strip():
        raise CheckpointError(repr(name), "a model without a name", f"give a directory, a hub id or {BUILTIN_TINY}")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(name, *not_there(path))
        return Location(name, str(path.parent), gguf=path.name)
    recover_directory(path / "checkpoint")
    if path.is_dir():
        inside = path / "checkpoint" if (path / "checkpoint").is_dir() else path
        if (path / "resume").is_dir() and inside == path:
            raise CheckpointError(name, "this run has not finished", "finish it: sftflow train RECIPE --resume")
        if adapters.is_adapter(inside):
            return Location(name, str(inside), adapter_of=adapters.base_name(inside))
        if not (inside / "config.json").is_file() and (files := files_of(inside, name)):
            return _nanochat(files)
        if not any((inside / f).is_file() for f in ("config.json", "tokenizer.json", "tokenizer_config.json")):
            raise CheckpointError(name, *_no_checkpoint(inside))
        return Location(name, str(inside))
    if path.is_file():
        if files := files_of(path, name):
            return _nanochat(files)
        raise CheckpointError(name, "a file, not a checkpoint directory", "give the folder that it lies in")
    if path.exists() or not hub.is_hub_id(name):
        otherwise = f"give a directory, a hub id or {BUILTIN_TINY}"
        raise CheckpointError(name, *not_there(path, "checkpoint directory", otherwise))
    folder = hub.snapshot(name)
    base = adapters.base_name(folder) if adapters.is_adapter(folder) else None
    return Location(name, str(folder), from_hub=True, adapter_of=base)


def _nanochat(files: Files) -> Location:
    if files.chosen:
        _tell(files.name, files.chosen)
    return Location(files.name, str(files.model.parent), nanochat=files)


@functools.cache
def _tell(name: str, chosen: str) -> None:
    """Once: a command asks several times where its model is."""
    log.warning("note: %s: taken is %s", name, chosen)


def _no_checkpoint(folder: Path) -> tuple[str, str]:
    """(fact, remedy) of a folder without config.json."""
    inside = sorted({p.parent.name for kind in ("config.json", adapters.CONFIG) for p in folder.glob(f"*/{kind}")})
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if inside:
        return f"no model in it, but in {', '.join(inside[:3])}", f"name one of them: {folder / inside[-1]}"
    if files:
        return "no config.json in it, but .gguf files", f"name one of them: {folder / files[0]}"
    return "no config.json in it", "give a Hugging Face checkpoint directory"


def base_location(adapter: Location) -> Location:
    """Where the base of an adapter is."""
    remedy = (
        "name the base in it (base_model_name_or_path), or: sftflow export ADAPTER --to merged --base BASE --out OUT"
    )
    if not adapter.adapter_of:
        raise CheckpointError(f"{adapter.name}/adapter_config.json", "the adapter names no base", remedy)
    try:
        base = resolve(adapter.adapter_of)
    except CheckpointError as error:
        put = "put it there" if error.fact.startswith("no such checkpoint") else error.remedy
        put = f"{put}, or name the base: sftflow export ADAPTER --to merged --base BASE --out OUT"
        raise CheckpointError(error.place, f"{error.fact} (the base of {adapter.name})", put) from None
    below, seen = base, {adapter.path}
    while below.adapter_of:
        if below.path in seen:
            fact = f"its base is an adapter of itself ({below.name})"
            raise CheckpointError(f"{adapter.name}/adapter_config.json", fact, remedy)
        seen.add(below.path)
        below = resolve(below.adapter_of)
    return base


def tokenizer_location(location: Location) -> Location:
    """Where a model's tokenizer and chat format are: of an adapter without a tokenizer, with its base."""
    if location.adapter_of is None:
        return location
    if adapters.has_tokenizer(Path(location.path)):
        return replace(location, adapter_of=None)
    return tokenizer_location(base_location(location))
