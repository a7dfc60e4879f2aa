"""Checkpoints: a Hugging Face directory plus `sftflow.json` (lineage, format, fingerprint, file hashes).

A model is named by a directory, a run directory (its `checkpoint/` is meant), `builtin:tiny`, a .gguf file, or a
hub id.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sftflow.gguf.reader as gguf
from sftflow.chat.format import ChatFormat, add_tokens, choose_format
from sftflow.chat.schema import Conversation
from sftflow.fingerprint import format_fingerprint
from sftflow.foundation.atomic_io import (
    check_hashes,
    read_record,
    recover_directory,
    sha256_file,
    with_checksum,
    write_directory,
    write_json,
)
from sftflow.foundation.errors import CheckpointError, RunError, first_line
from sftflow.foundation.rounding import round_bf16
from sftflow.gguf.vocabulary import as_llama_cpp_splits
from sftflow.gguf.writer import FORMAT

if TYPE_CHECKING:
    from sftflow.chat.render import Renderer
    from sftflow.foundation.runtime import Runtime
    from sftflow.generation.engine import Engine
    from sftflow.generation.request import GenerationRequest

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


@dataclass
class Assistant:
    """A loaded checkpoint that can talk: model, tokenizer, renderer and engine of one format."""

    name: str
    model: Any
    tokenizer: Any
    renderer: Renderer
    engine: Engine
    info: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """How the checkpoint asks for its tokens to be drawn: temperature (0: greedy), top_p (1: off), top_k (0: off),
        min_p (0: off), repetition_penalty (1: off).

        Its generation_config.json is read as transformers' `generate` reads it: without do_sample it is greedy, and
        only the penalty counts. Nearly all checkpoints have no penalty either: then a reply here is decoded as
        evaluation decodes, so that what one sees is what was measured.
        """
        config = getattr(self.model, "generation_config", None)
        drawn = bool(getattr(config, "do_sample", False))
        off = {"temperature": float(drawn), "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        own = {key: getattr(config, key, None) for key in (off if drawn else ("repetition_penalty",))}
        return {**off, **{key: type(off[key])(value) for key, value in own.items() if value is not None}}

    def request(
        self, prompt: Conversation | Sequence[int], *, max_tokens: int | None = None, **options: Any
    ) -> GenerationRequest:
        """What the engine is asked for the next reply of a conversation (or behind a prompt's ids).

        max_tokens: of the reply; at most, and by default, as many as the context has room for.
        options: further fields of `GenerationRequest`; where one is left out or None, the checkpoint's own `sampling`
        counts, else the field's default.

        Raises what rendering raises. A prompt that leaves no room for a token is refused by the engine.
        """
        from sftflow.generation.request import GenerationRequest

        if isinstance(prompt, Conversation):
            ids = tuple(self.renderer.render(prompt, add_generation_prompt=True).ids.tolist())
        else:
            ids = tuple(prompt)
        room = max(1, self.engine.context - len(ids))
        fields = {**self.sampling, **{name: value for name, value in options.items() if value is not None}}
        if fields["temperature"] < 1e-4:
            fields["temperature"] = 0.0  # the limit of ever smaller ones
        fields["top_p"] = max(fields["top_p"], 1e-6)
        fields["top_k"] = max(fields["top_k"], 0)  # -1 is "off", too
        limit = room if max_tokens is None else min(max_tokens, room)
        return GenerationRequest(prompt_ids=ids, max_new_tokens=limit, **fields)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Plain text as the base was pretrained to read it: with the tokenizer's own BOS, without control tokens."""
        opening = self.tokenizer("").input_ids  # BOS where the tokenizer writes one
        if opening and opening[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            opening = opening[:-1]
        return (*opening, *self.renderer.encode_plain(text))


def resolve(name: str) -> Location:
    """Find the files behind a model name. Raises CheckpointError where there are none, or a shard is missing."""
    if name == BUILTIN_TINY:
        return Location(name, str(Path(__file__).parent / "pretraining" / "tiny"))
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


def grow_embeddings(model: Any, n_tokens: int) -> int:
    """Give the model rows for the tokenizer's new tokens, each at the mean of the old rows; weights stay tied.

    Returns how many rows were added.
    """
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    if n_tokens <= old:
        return 0
    ends = [end for end in (model.get_input_embeddings, model.get_output_embeddings) if end() is not None]
    means = [end().weight.detach().float().mean(0) for end in ends]
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for end, mean in zip(ends, means, strict=True):
            end().weight[old:] = mean.to(end().weight.dtype)
    return n_tokens - old


def prepare(
    location: Location, *, format_name: str = "auto", fallback: ChatFormat | None = None
) -> tuple[Any, Any, Renderer, dict[str, Any]]:
    """(model, tokenizer, renderer, info): a checkpoint ready to be trained or asked in one format.

    info: its sftflow.json, and `own_template`: whether it brought a chat template.
    fallback: the format of a checkpoint that has none of its own, instead of `sftflow`.

    Raises CheckpointError where the stored fingerprint is not that of the files.
    """
    from sftflow.chat.render import Renderer

    model, info = load_model(location)
    tokenizer = load_tokenizer(location)
    chat_format = choose_format(format_name, tokenizer, info.get("format"))
    info["own_template"] = bool(getattr(tokenizer, "chat_template", None))
    if fallback is not None and not info["own_template"]:
        chat_format = fallback
    stored = info.get("fingerprint")
    if stored and format_name == "auto":
        now = format_fingerprint(tokenizer, chat_format)
        if now != stored:
            fact = f"tokenizer or chat format changed since training (fingerprint {stored} -> {now})"
            remedy = "restore tokenizer.json and chat_template.jinja, or train again"
            raise CheckpointError(location.name, fact, remedy)
    add_tokens(tokenizer, chat_format)
    grow_embeddings(model, len(tokenizer))
    return model, tokenizer, Renderer(tokenizer, chat_format), info


def load_assistant(
    name: str, *, format: str = "auto", precision: str = "fp32", fallback: ChatFormat | None = None
) -> Assistant:
    """Load a checkpoint that answers in a chat format (its own, or the named one)."""
    from sftflow.foundation.runtime import detect

    location = resolve(name)
    model, tokenizer, renderer, info = prepare(location, format_name=format, fallback=fallback)
    runtime = detect(precision)
    model.to(runtime.device).eval()
    return assistant_of(model, tokenizer, renderer, runtime, name=name, info=info)


def assistant_of(
    model: Any,
    tokenizer: Any,
    renderer: Renderer,
    runtime: Runtime,
    *,
    name: str = "",
    info: dict[str, Any] | None = None,
    tick: Callable[[], None] | None = None,
) -> Assistant:
    """A model in memory, with an engine of its own.   tick: called before every forward pass; what it raises ends the
    generation."""
    from sftflow.generation.engine import Engine

    return Assistant(name, model, tokenizer, renderer, Engine(model, renderer, runtime, tick=tick), info or {})


def base_format(sft: Assistant) -> ChatFormat:
    """The SFT model's format, to be given to a base that has none: with the control tokens it needs."""
    chat_format = sft.renderer.format
    return replace(chat_format, tokens=tuple(t for t in sft.renderer.special if t in chat_format.template))


def _stored(weight: Any, dtype: Any) -> Any:
    """The weight in the checkpoint's dtype: in bf16 as training rounds it, so that what was measured is saved."""
    import torch

    if dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return round_bf16(weight)
    return weight.detach().to(dtype)


def save(target: Path, model: Any, tokenizer: Any, renderer: Renderer, *, dtype: Any, meta: dict[str, Any]) -> None:
    """Write a checkpoint directory, whole or not at all.

    It loads with AutoModelForCausalLM, carries the chat template, and stops at the end-of-turn token by its
    generation_config.json. The weights are written in `dtype`.
    """
    chat_format: ChatFormat = renderer.format
    stop = renderer.stop_ids()

    def fill(directory: Path) -> None:
        state = {k: _stored(v, dtype).cpu().contiguous() for k, v in model.state_dict().items()}
        tied = getattr(model, "_tied_weights_keys", None)
        if tied and model.config.tie_word_embeddings:
            for key in tied:
                state.pop(key, None)
        old_dtype = model.config.dtype
        implementation = model.config._attn_implementation
        model.config.dtype = dtype
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        model.generation_config.eos_token_id = stop if len(stop) != 1 else stop[0]
        # A base's generation config may hold sampling values without do_sample, which saving refuses.
        model.generation_config.do_sample = bool(model.generation_config.do_sample)
        if not model.generation_config.do_sample:
            for key in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                setattr(model.generation_config, key, None)
        try:
            model.save_pretrained(directory, state_dict=state)
        finally:
            model.config.dtype = old_dtype
            model.set_attn_implementation(implementation)
        _save_tokenizer(tokenizer, directory)
        files = sorted(p for p in directory.iterdir() if p.is_file())
        record = {
            **meta,
            "kind": "sft",
            "format": chat_format.to_json(),
            "fingerprint": format_fingerprint(tokenizer, chat_format),
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": {p.name: sha256_file(p) for p in files},
        }
        write_json(directory / "sftflow.json", with_checksum(record))

    write_directory(target, fill)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """The tokenizers library raises a bare Exception where the disk is full; here it is an OSError."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if isinstance(error, OSError) or f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    # transformers builds a Llama tokenizer anew on loading, by `legacy`, and forgets to save that: text behind control
    # tokens would then be encoded otherwise than in training.
    legacy = getattr(tokenizer, "legacy", None)
    path = directory / "tokenizer_config.json"
    if legacy is not None and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "legacy": legacy}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
