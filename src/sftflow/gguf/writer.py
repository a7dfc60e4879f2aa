"""Write a checkpoint as one GGUF file: whole or not at all, and a tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sftflow.gguf.architectures as layout
import sftflow.gguf.ends as ends
from sftflow.chat.format import tokenizer_text
from sftflow.chat.render import Renderer
from sftflow.foundation.errors import CheckpointError
from sftflow.gguf.architectures import Architecture, Array
from sftflow.gguf.vocabulary import Vocabulary

TYPES = ("f32", "f16", "bf16", "q8_0")
CONFIG, FORMAT, NAMES = "sftflow.config", "sftflow.format", "sftflow.special_tokens"
"""our own fields: config.json, the format of sftflow.json, and what the template calls tokens by"""
GENERATION = "sftflow.generation"
"""generation_config.json: how replies are drawn unasked"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is written. weights: torch's tensors by transformers' names; the output head is left out where it is the
    embedding.   generation: of generation_config.json, what is no default."""

    config: Any
    layout: Architecture
    vocabulary: Vocabulary
    renderer: Renderer
    name: str
    kind: str
    weights: dict[str, Any]
    generation: dict[str, Any]


def stored_kind(kind: str, shape: tuple[int, ...]) -> str:
    """How a tensor is stored: vectors (norms, biases) in f32 always; rows that 32-number blocks do not fit in f16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def write(plan: Plan, target: Path, *, before: Callable[[], None] = lambda: None) -> None:
    """before: called when the whole file is written, just before it takes its place.

    Raises CheckpointError where a number of the weights does not fit the type.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(str(beside), plan.layout.arch)
    try:
        _describe(writer, plan)
        factors = layout.rope_factors(plan.config)
        if factors is not None:
            writer.add_tensor_info(layout.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, types.F32)
        for name, weight in plan.weights.items():
            shape = tuple(weight.shape)
            as_type = types[stored_kind(plan.kind, shape).upper()]
            block, size = gguf.GGML_QUANT_SIZES[as_type]
            n_bytes = int(np.prod(shape)) // block * size
            writer.add_tensor_info(str(layout.gguf_name(name)), shape, np.dtype(np.float32), n_bytes, as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, weight in plan.weights.items():
            array = weight.detach().float().cpu().numpy()
            heads = layout.permuted(name, plan.config, plan.layout)
            array = layout.interleave(array, heads) if heads else array
            writer.write_tensor_data(_encoded(array, stored_kind(plan.kind, array.shape), f"{plan.name}: {name}"))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        before()
        beside.replace(target)
    finally:
        writer.close()
        beside.unlink(missing_ok=True)


def _encoded(array: Array, kind: str, place: str) -> Array:
    import gguf

    if not np.isfinite(array).all():
        raise CheckpointError(
            place, "it holds numbers that are not finite", "copy the checkpoint again, or give another"
        )
    if kind == "f16" and float(np.abs(array).max(initial=0)) > 65504:
        raise CheckpointError(place, "it holds numbers beyond what f16 reaches", "use --type bf16 or f32")
    encoded: Array = gguf.quantize(np.ascontiguousarray(array, np.float32), gguf.GGMLQuantizationType[kind.upper()])
    return encoded


def _describe(writer: Any, plan: Plan) -> None:
    """Everything but the weights."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(plan.name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if plan.kind == "f32" else f"MOSTLY_{plan.kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layout.add_shape(writer, plan.config)
    writer.add_vocab_size(len(plan.vocabulary.tokens))
    plan.vocabulary.write(writer)
    _special_ids(writer, plan)
    named = {name: _exported(plan.renderer, template) for name, template in plan.renderer.format.named.items()}
    templates = [{"name": n, "template": t} for n, t in {"default": exported_template(plan.renderer), **named}.items()]
    writer.add_chat_template(templates)  # llama.cpp takes "tool_use" where a request has tools
    # What GGUF's own fields cannot say exactly: for our own loader, and for programs that use the tokenizers library.
    renderer = plan.renderer
    writer.add_string(gguf.Keys.Tokenizer.HF_JSON, tokenizer_text(renderer.tokenizer))
    config = {k: v for k, v in plan.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
    writer.add_string(CONFIG, json.dumps(config))
    writer.add_string(FORMAT, json.dumps({**renderer.format.to_json(), "kwargs": {}, "append_eos": False}))
    writer.add_string(NAMES, json.dumps(renderer.spec.names))
    writer.add_string(GENERATION, json.dumps(plan.generation))


def _special_ids(writer: Any, plan: Plan) -> None:
    """bos, unk and pad are what the template calls so."""
    special, names = plan.renderer.special, plan.renderer.spec.names
    for name in ("bos_token", "unk_token", "pad_token"):
        if names.get(name) in special:
            getattr(writer, f"add_{name}_id")(special[names[name]])
    for key, end in end_fields(plan.renderer, plan.vocabulary, plan.name).items():
        writer.add_uint32(key, end)


def end_fields(renderer: Renderer, vocabulary: Vocabulary, place: str) -> dict[str, int]:
    """The fields that name the ends of a reply. Raises CheckpointError where llama.cpp cannot be told all of them."""
    stops = renderer.stop_ids()
    if not stops:
        raise CheckpointError(place, "no token ends its replies", "give it a chat format that writes an end of turn")
    eos = renderer.spec.eos if renderer.spec.eos is not None else stops[0]
    return ends.fields_for(stops, eos, vocabulary.tokens, vocabulary.model, place)


_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def exported_template(renderer: Renderer) -> str:
    """The chat template as llama.cpp must read it: the date it was trained with written in, and no bos or eos where
    the tokenizer has none (llama.cpp then takes token 11 for both)."""
    return _exported(renderer, renderer.format.template)


def _exported(renderer: Renderer, template: str) -> str:
    template = _CLOCK.sub(lambda m: json.dumps(renderer.format.clock(m[2])), template)
    lacking = [n for n in ("bos_token", "eos_token") if n in template and not renderer.spec.names.get(n)]
    return "".join(f"{{%- set {name} = '' -%}}" for name in lacking) + template
