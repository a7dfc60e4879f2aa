"""Reading what is there: tokenizer, config, weights, sftflow.json."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftflow.gguf.reader as gguf
from sftflow.chat.format import add_tokens, choose_format
from sftflow.checkpoint import adapters, hub
from sftflow.checkpoint.adapter_files import CONFIG, names_another_base, recorded_base
from sftflow.checkpoint.generation import read_ends
from sftflow.checkpoint.location import Location, base_location, tokenizer_location
from sftflow.checkpoint.templates import read_templates
from sftflow.checkpoint.tokenizer import read_tokenizer
from sftflow.checkpoint.weights import COPY_AGAIN, RESTORE, load_weights, not_finite, require_whole, stored_types
from sftflow.fingerprint import weights_and_body_hash
from sftflow.foundation.atomic_io import (
    check_hashes,
    read_record,
    reason,
)
from sftflow.foundation.errors import CheckpointError, RunError, first_line, said_of
from sftflow.gguf.vocabulary import as_llama_cpp_splits
from sftflow.gguf.writer import FORMAT
from sftflow.nanochat import vocabulary
from sftflow.nanochat import weights as nanochat_weights
from sftflow.nanochat.files import state_of

if TYPE_CHECKING:
    from sftflow.chat.render import Renderer

_NOT_MAPPED = (errno.ENOMEM, errno.ENODEV, errno.EAGAIN, errno.ENFILE, errno.EMFILE)


def _check_files(location: Location, *, weights: bool = True) -> dict[str, Any]:
    """The directory's sftflow.json ({} where there is none), after checking the recorded hashes.

    weights: check those, too, not only the small files.
    """
    if location.gguf or location.nanochat:
        return load_info(location)
    directory = Path(location.path)
    if weights and location.from_hub:
        hub.fetch_weights(location.name, directory)
    info = load_info(location)
    recorded: dict[str, str] = info.get("sha256", {})
    if CONFIG in recorded and names_another_base(directory, recorded[CONFIG]):
        recorded = {name: hashed for name, hashed in recorded.items() if name != CONFIG}
    small = {name: hashed for name, hashed in recorded.items() if not name.endswith(".safetensors")}
    check_hashes(directory, recorded if weights else small, RESTORE, location.name)
    return info


def load_tokenizer(location: Location) -> Any:
    """The fast tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    location = tokenizer_location(location)
    _check_files(location, weights=False)
    with _reading(location) as own:
        if own:
            return gguf.tokenizer_of(own)
        if location.nanochat:
            return vocabulary.tokenizer_of(location.nanochat)
        if not location.gguf:
            tokenizer = read_tokenizer(Path(location.path), **location.load_args)
            read_templates(Path(location.path), tokenizer)
            return tokenizer
        tokenizer = AutoTokenizer.from_pretrained(location.path, **location.load_args)
        as_llama_cpp_splits(tokenizer, gguf.told_of_tokenizer(location.file), location.name)
        gguf.add_named_templates(tokenizer, location.file)
        return tokenizer


def load_config(location: Location) -> Any:
    """The transformers config of a checkpoint, without its weights; of an adapter, its base's."""
    from transformers import AutoConfig

    if location.adapter_of is not None:
        return load_config(base_location(location))
    _check_files(location, weights=False)
    with _reading(location) as own:
        if own:
            return gguf.config_of(own)
        if location.nanochat:
            files = location.nanochat
            return nanochat_weights.config_of(files.meta, state_of(files), files.name)
        return AutoConfig.from_pretrained(location.path, **location.load_args)


def load_ends(location: Location, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which the checkpoint itself says that a reply ends.

    tokenizer: as it was loaded, before a format's tokens are added.
    """
    if location.adapter_of is not None:
        return load_ends(base_location(location), tokenizer)
    if location.gguf:  # a reply ends where llama.cpp would end it
        with _reading(location):
            return gguf.read_ends(location.file)
    if location.nanochat:
        return vocabulary.ends_of(tokenizer)
    return read_ends(Path(location.path), tokenizer)


def load_info(location: Location) -> dict[str, Any]:
    """sftflow.json of a checkpoint: {} where there is none. Raises CheckpointError where it is damaged.

    Of an adapter: what its base's says of both, and the base's name.
    """
    if location.adapter_of is not None:
        return _info_of_adapter(location)
    if location.gguf:
        with _reading(location) as own:
            return {"format": own[FORMAT]} if own else {}
    if location.nanochat:
        return location.nanochat.record
    path = Path(location.path) / "sftflow.json"
    return read_record(path, RESTORE) if path.is_file() else {}


def _info_of_adapter(location: Location) -> dict[str, Any]:
    base = base_location(location)
    own = Path(location.path) / "sftflow.json"
    if own.is_file():  # trained here
        record = read_record(own, RESTORE)
        return {**record, "base": {**(record.get("base") or {}), "name": base.name}}
    info = load_info(base)
    kept = ["recipe", "kind", "dtype"]
    if tokenizer_location(location).path != location.path:
        kept += ["format", "fingerprint"]
    elif "format" in info and load_tokenizer(location).chat_template == load_tokenizer(base).chat_template:
        kept += ["format"]  # its arguments and clock, which stand in no template
    of_base = {"name": base.name, **{key: info.get(key) for key in ("fingerprint", "kind", "base")}}
    return {"base": of_base, **{key: info[key] for key in kept if key in info}}


def open_renderer(location: Location, format_name: str) -> Renderer:
    """A renderer without the model: the checkpoint's tokenizer, in the named format or its own stored one."""
    from sftflow.chat.render import Renderer

    tokenizer, begins = load_tokenizer(location), begun_by_bos(location)
    ends = load_ends(location, tokenizer)
    location = tokenizer_location(location)
    chat_format = choose_format(format_name, tokenizer, load_info(location).get("format"))
    add_tokens(tokenizer, chat_format)
    return Renderer(tokenizer, chat_format, ends=ends, begun_by_bos=begins)


def begun_by_bos(location: Location) -> bool:
    """Whether the base was pretrained on documents that begin with BOS, though its tokenizer does not write it."""
    if location.adapter_of is not None:
        return begun_by_bos(base_location(location))
    if location.nanochat or location.gguf:
        return location.nanochat is not None
    file = Path(location.path) / "config.json"
    return file.is_file() and (read_record(file, RESTORE) or {}).get("model_type") in vocabulary.BEGUN_BY_BOS


def load_model(location: Location) -> tuple[Any, dict[str, Any]]:
    """(model in fp32 on the CPU, its sftflow.json). An adapter is added into its base.

    Raises CheckpointError naming a missing or damaged file, and the tensors that are missing, strange, of another shape
    or not finite; of an adapter, also what `adapters.merge_into` does.
    """
    if location.adapter_of is not None:
        return load_merged(location)[0], load_info(location)
    info = load_info(location) if location.gguf else _check_files(location)
    with _reading(location) as own:
        if own:
            model = gguf.model_of(location.file, own)
        elif location.nanochat:
            model = nanochat_weights.model_of(location.nanochat)
        elif location.gguf:
            model = _from_other_gguf(location)
        else:
            model = load_weights(Path(location.path), location.name)
    model = model.float()
    which = not_finite(model)
    if which:
        raise CheckpointError(location.name, f"its weights are not finite ({which})", "give another, or copy it again")
    return model, info


def _from_other_gguf(location: Location) -> Any:
    """The model of a GGUF file that another program wrote, de-quantised by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        location.path, dtype=torch.float32, output_loading_info=True, **location.load_args
    )
    require_whole(model, report, location.name)
    # The de-quantised model remembers its quantisation and refuses to be saved; a fresh one does not.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def load_merged(location: Location) -> tuple[Any, adapters.Unmerged]:
    """(an adapter's base with the adapter added, what it was compared with).

    Raises as `adapters.merge_into`; CheckpointError also for a base that is quantised, or is not the one that the
    adapter's record has the hash of.
    """
    base = base_location(location)
    if quantised := getattr(load_config(base), "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        fact = f"its weights are quantised ({kind}), and {location.name} cannot be added into those"
        raise CheckpointError(base.name, fact, "name the full base: sftflow export ADAPTER --to merged --base BASE")
    _check_files(replace(location, adapter_of=None))
    model, _ = load_model(base)
    recorded = recorded_base(Path(location.path)).get("body")
    if base.adapter_of is not None:  # merging rounds as the machine does, and that adapter has its own base checked
        recorded = None
    if recorded and recorded != (found := weights_and_body_hash(model)[1]):
        fact = f"its base {base.name} is not the one that it was trained on (weights {recorded} -> {found})"
        remedy = "restore that, or name it: sftflow export ADAPTER --to merged --base BASE"
        raise CheckpointError(location.name, fact, remedy)
    tokenizer, n_before = load_tokenizer(location), len(load_tokenizer(base))
    n_tokens = len(tokenizer) if len(tokenizer) > n_before else 0
    return adapters.merge_into(model, Path(location.path), location.name, n_tokens, _padding(tokenizer))


def _padding(tokenizer: Any) -> list[int]:
    """The id that only fills rows up: no text, no end of a reply and no chat template has it."""
    pad, token = tokenizer.pad_token_id, tokenizer.pad_token
    others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    return [] if pad is None or pad in others or token in str(tokenizer.chat_template) else [pad]


def stored_dtype(location: Location, *, of_gguf: Any = None) -> Any:
    """The torch dtype that most of the weights are stored in, whatever config.json says; fp32 for one that is no
    floating-point type of 16 or 32 bits. Of an adapter, its base's.

    of_gguf: for a GGUF file, whose own types are none of torch's; bf16 where None, as real checkpoints are published.
    """
    import torch

    while location.adapter_of is not None:
        location = base_location(location)
    if location.gguf:
        return of_gguf or torch.bfloat16
    if location.nanochat:
        state = state_of(location.nanochat)
        most = Counter(weight.dtype for weight in state.values()).most_common(1)[0][0]
        return most if most in (torch.bfloat16, torch.float16) else torch.float32
    kinds = Counter(stored_types(Path(location.path), location.name).values())
    named = {"BF16": torch.bfloat16, "F16": torch.float16}
    return named.get(kinds.most_common(1)[0][0], torch.float32)


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
        if "mmap" in str(error) or (isinstance(error, OSError) and error.errno in _NOT_MAPPED):
            remedy = "free memory, or copy the checkpoint to a disk that can be mapped"
            raise RunError(
                location.name, f"its files cannot be mapped into memory ({reason(error)})", remedy
            ) from error
        if "trust_remote_code" in str(error):
            fact = "it needs code of its own, and code from a checkpoint is not run"
            remedy = "use one whose model_type and tokenizer transformers itself has"
            raise CheckpointError(location.name, fact, remedy) from error
        if "for this kind of AutoModel" in str(error):
            fact = f"transformers has no causal language model for a {load_config(location).model_type}"
            raise CheckpointError(location.name, fact, "give a text model") from error
        if "conversion of the weights" in str(error):
            fact = "its tensors do not fit together: some are missing, or of another shape"
            raise CheckpointError(location.name, fact, f"{COPY_AGAIN}, with its own config.json") from error
        fact, remedy = _unread(location, error)
        raise CheckpointError(location.name, fact, remedy) from error


def _unread(location: Location, error: Exception) -> tuple[str, str]:
    """(fact, remedy) of what a library says of a checkpoint that it does not read."""
    lines = " ".join(str(error).split())
    fact = f"cannot be loaded ({type(error).__name__}: {lines[:300]})"
    if location.gguf:
        return fact, "export it again, or give the checkpoint that it was made from"
    if location.nanochat:
        return fact, "copy the checkpoint again, with its meta file and tokenizer"
    folder = Path(location.path)
    if isinstance(error, OSError) and error.errno:
        said, remedy = said_of(error)
        return f"cannot be read ({said}: {error.filename})", remedy
    if isinstance(error, ImportError) or "GPU" in lines:
        remedy = "install that package" if isinstance(error, ImportError) else "run it where there is a GPU"
        if (read_record(folder / "config.json", RESTORE) or {}).get("quantization_config"):
            remedy += "; to train, give the base in bf16: quantised weights cannot be trained"
        return fact, remedy
    if found := re.search(r"model type `(.+?)`", lines):
        fact = f"transformers {version('transformers')} knows no model of type {found[1]!r}"
        return fact, "pip install -U transformers, or give another model"
    if "`model_type` key" in lines:
        return "its config.json names no model_type", f"{COPY_AGAIN}, with its own config.json"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return "no tokenizer in it", "copy tokenizer.json and tokenizer_config.json into it, too"
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as wrong:
            return f"its {file.name} is not JSON ({first_line(wrong)})", "mend it, or copy the checkpoint again"
    if "alidation error" in lines:
        return f"its config.json asks for what no model is ({lines[:300]})", "correct it, or copy the checkpoint again"
    return fact, "copy the checkpoint again, or give another"
