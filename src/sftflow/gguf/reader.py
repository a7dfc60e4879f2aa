"""Reads a GGUF file that writer.py wrote: config, tokenizer, chat format and weights as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sftflow.gguf.architectures as layout
import sftflow.gguf.ends as ends
from sftflow.gguf.writer import CONFIG, FORMAT, GENERATION, NAMES

TEMPLATES = "tokenizer.chat_templates"


def fields(path: Path) -> dict[str, Any] | None:
    """What writer.py stores besides GGUF's usual fields, so that nothing is lost; None where another program wrote the
    file.

    {"sftflow.config": {...}, "sftflow.format": {...}, "sftflow.special_tokens": {...},
     "sftflow.generation": {...}, "tokenizer.huggingface.json": "...",
     "tokenizer.chat_template": "...", "tokenizer.chat_templates": {NAME: "..."}}

    Raises ValueError where some of these are missing: another program has changed the file.
    """
    import gguf

    found = gguf.GGUFReader(path).fields
    if CONFIG not in found:
        return None
    plain = (gguf.Keys.Tokenizer.HF_JSON, gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    missing = [key for key in (FORMAT, NAMES, *plain) if key not in found]
    if missing:
        raise ValueError(f"it has {CONFIG} and no {missing[0]}")
    out: dict[str, Any] = {key: json.loads(found[key].contents()) for key in (CONFIG, FORMAT, NAMES)}
    out |= {key: found[key].contents() for key in plain}
    # (Files that were written before it was stored have none.)
    out[GENERATION] = json.loads(found[GENERATION].contents()) if GENERATION in found else {}
    return {**out, TEMPLATES: _named_templates(found)}


def _named_templates(fields: Any) -> dict[str, str]:
    """The templates beside the default one, as `tool_use`."""
    import gguf

    names = fields[TEMPLATES].contents() if TEMPLATES in fields else []
    return {name: fields[gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)].contents() for name in names}


def add_named_templates(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer that transformers made of a file all its chat templates: it takes the default one only."""
    import gguf

    named = _named_templates(gguf.GGUFReader(path).fields)
    if named:
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = {**default, **named}


def told_of_tokenizer(path: Path) -> dict[str, Any]:
    """What any program's file says of splitting: model, pre and add_space_prefix (where it has them), architecture."""
    import gguf

    found = gguf.GGUFReader(path).fields
    keys = {"architecture": "general.architecture"}
    keys |= {name: f"tokenizer.ggml.{name}" for name in ("model", "pre", "add_space_prefix")}
    return {name: found[key].contents() for name, key in keys.items() if key in found}


def read_ends(path: Path) -> tuple[int, ...]:
    """Ids at which llama.cpp ends a reply of this file, whoever wrote it."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    tokens, model = (fields[key].contents() for key in (gguf.Keys.Tokenizer.LIST, gguf.Keys.Tokenizer.MODEL))
    named = {key: int(fields[key].contents()) for key in ends.KEYS if key in fields}
    return tuple(ends.ends_of(tokens, named, model))


def config_of(own: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = dict(own[CONFIG])
    return AutoConfig.for_model(config.pop("model_type"), **config)


def tokenizer_of(own: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(own["tokenizer.huggingface.json"]),
        clean_up_tokenization_spaces=False,
        **own[NAMES],
    )
    template, named = own["tokenizer.chat_template"], own[TEMPLATES]
    tokenizer.chat_template = {"default": template, **named} if named else template
    return tokenizer


def model_of(path: Path, own: dict[str, Any]) -> Any:
    """The model in fp32, with the weights as the file's type has rounded them."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = config_of(own)
    table = layout.layout_of(config, str(path))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    state = {}
    for name, old in model.state_dict().items():
        tensor = stored.pop(str(layout.gguf_name(name)), None)
        if tensor is None and name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if tensor is None:
            raise ValueError(f"no tensor {layout.gguf_name(name)} in it")
        array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(old.shape))
        heads = layout.permuted(name, config, table)
        state[name] = torch.from_numpy((layout.separate(array, heads) if heads else array).copy())
    stored.pop(layout.ROPE_FACTORS, None)  # they follow from the config
    if stored:
        raise ValueError(f"{type(model).__name__} has no place for its tensor {min(stored)}")
    model.load_state_dict(state, strict=False)
    if own[GENERATION]:
        model.generation_config = GenerationConfig(**own[GENERATION])
    model.tie_weights()
    return model
