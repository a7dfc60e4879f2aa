"""What a model's name means, and reading what is there: tokenizer, config, weights, sftflow.json."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftflow.gguf.reader as gguf
from sftflow.chat.format import add_tokens, choose_format
from sftflow.foundation.atomic_io import (
    check_hashes,
    read_record,
    recover_directory,
)
from sftflow.foundation.errors import CheckpointError, RunError, first_line
from sftflow.gguf.vocabulary import as_llama_cpp_splits
from sftflow.gguf.writer import FORMAT

if TYPE_CHECKING:
    from sftflow.chat.render import Renderer

BUILTIN_TINY = "builtin:tiny"
COPY_AGAIN = "copy the checkpoint again"


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's files are. path: a directory, or a hub id where `is_hub`; gguf: file name inside it."""

    name: str
    path: str
    gguf: str | None = None
    is_hub: bool = False

    @property
    def file(self) -> Path:
        """The .gguf file."""
        return Path(self.path) / str(self.gguf)

    @property
    def load_args(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve(name: str) -> Location:
    """Find the files behind a model name. Raises CheckpointError where there are none, or a shard is missing."""
    if name == BUILTIN_TINY:
        return Location(name, str(Path(__file__).parents[1] / "pretraining" / "tiny"))
    if name.startswith("builtin:"):
        raise CheckpointError(name, "no such built-in base", f"use {BUILTIN_TINY}")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(name, "no such file", "check the path")
        return Location(name, str(path.parent), gguf=path.name)
    if path.is_dir() or (path / "checkpoint").is_dir():
        recover_directory(path / "checkpoint")
        inside = path / "checkpoint" if (path / "checkpoint").is_dir() else path
        if (path / "resume").is_dir() and not (path / "checkpoint").is_dir():
            raise CheckpointError(name, "this run has not finished", "continue it with train RECIPE --resume")
        if not any((inside / f).is_file() for f in ("config.json", "tokenizer.json", "tokenizer_config.json")):
            raise CheckpointError(name, "no config.json in it", "give a Hugging Face checkpoint directory")
        return Location(name, str(inside))
    looks_like_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not path.suffix
    if not looks_like_hub or path.exists():
        raise CheckpointError(name, "no such checkpoint directory", f"give a directory, a hub id or {BUILTIN_TINY}")
    return Location(name, name, is_hub=True)


def _check_files(location: Location, *, weights: bool = True) -> dict[str, Any]:
    """The directory's sftflow.json ({} where there is none), after checking the recorded hashes and the shards.

    weights: check those, too, not only the small files.
    """
    if location.is_hub or location.gguf:
        return {}
    directory = Path(location.path)
    info = load_info(location)
    recorded: dict[str, str] = info.get("sha256", {})
    small = {name: hashed for name, hashed in recorded.items() if not name.endswith(".safetensors")}
    check_hashes(directory, recorded if weights else small, COPY_AGAIN, location.name)
    if not weights:
        return info
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(str(index), "not a shard index", COPY_AGAIN) from None
        for shard in shards:
            if not (directory / shard).is_file():
                raise CheckpointError(f"{location.name}/{shard}", "this shard is missing", COPY_AGAIN)
    elif not any(directory.glob("*.safetensors")):
        remedy = "pickled weights are not loaded; convert them to safetensors"
        raise CheckpointError(location.name, "no model.safetensors in it", remedy)
    return info


def load_tokenizer(location: Location) -> Any:
    """The fast tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    _check_files(location, weights=False)
    with _reading(location) as own:
        if own:
            return gguf.tokenizer_of(own)
        tokenizer = AutoTokenizer.from_pretrained(location.path, **location.load_args)
        if location.gguf:
            as_llama_cpp_splits(tokenizer, gguf.pre_tokenizer(location.file))
        return tokenizer


def load_config(location: Location) -> Any:
    """The transformers config of a checkpoint, without its weights."""
    from transformers import AutoConfig

    _check_files(location, weights=False)
    with _reading(location) as own:
        if own:
            return gguf.config_of(own)
        return AutoConfig.from_pretrained(location.path, **location.load_args)


def load_info(location: Location) -> dict[str, Any]:
    """sftflow.json of a checkpoint: {} where there is none. Raises CheckpointError where it is damaged."""
    if location.gguf:
        with _reading(location) as own:
            return {"format": own[FORMAT]} if own else {}
    path = Path(location.path) / "sftflow.json"
    return read_record(path, COPY_AGAIN) if path.is_file() else {}


def open_renderer(location: Location, format_name: str) -> Renderer:
    """A renderer without the model: the checkpoint's tokenizer, in the named format or its own stored one."""
    from sftflow.chat.render import Renderer

    tokenizer = load_tokenizer(location)
    chat_format = choose_format(format_name, tokenizer, load_info(location).get("format"))
    add_tokens(tokenizer, chat_format)
    return Renderer(tokenizer, chat_format)


def load_model(location: Location) -> tuple[Any, dict[str, Any]]:
    """(model in fp32 on the CPU, its sftflow.json). Raises CheckpointError naming a missing or damaged file."""
    import torch
    from transformers import AutoModelForCausalLM

    info = load_info(location) if location.gguf else _check_files(location)
    with _reading(location) as own:
        if own:
            return gguf.model_of(location.file, own), info
        model = AutoModelForCausalLM.from_pretrained(location.path, dtype=torch.float32, **location.load_args)
        if location.gguf:
            # The de-quantised model remembers its quantisation and refuses to be saved; a fresh one does not.
            config = copy.deepcopy(model.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            fresh = type(model)(config)
            fresh.load_state_dict(model.state_dict())
            fresh.tie_weights()
            fresh.generation_config = model.generation_config
            model = fresh
    return model.float(), info


@contextlib.contextmanager
def _reading(location: Location) -> Iterator[dict[str, Any] | None]:
    """Gives what a .gguf file of ours has of its own (`gguf.reader.fields`), None for other checkpoints; the loading
    libraries' errors become one line that names the checkpoint."""
    try:
        yield gguf.fields(location.file) if location.gguf else None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of many kinds
        if location.gguf and (isinstance(error, ImportError) or "pip install" in str(error)):
            fact = "reading .gguf needs the packages gguf and accelerate"
            raise CheckpointError(location.name, fact, "pip install 'sftflow[gguf]'") from error
        remedy = "check the id and the network" if location.is_hub else "check that the files are whole"
        fact = f"cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise CheckpointError(location.name, fact, remedy) from error


def require_finite_weights(model: Any, name: str, remedy: str = "give another checkpoint, or copy it again") -> None:
    """Raises RunError naming the first weight with a NaN or an infinity in it: all that comes of it is NaN, too."""
    for which, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise RunError(name, f"its weights are not finite ({which})", remedy)
