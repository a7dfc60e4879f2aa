"""Adapters of peft: what a directory holds, and a base with it added, proven on the logits.

peft wraps the base; what the wrapped model computes is the truth. Then the weights are added into the base's own, and
the result must compute the same. Weights that the base shares (a tied head) are parted first, so that what the adapter
adds to one end stays out of the other; they are tied again where both ends come out equal.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from sftflow.checkpoint.weights import WRAPPERS, no_weights, settle_head, unreadable
from sftflow.foundation.atomic_io import read_record
from sftflow.foundation.errors import CheckpointError, ProofError, SftflowError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOLERANCE = 1e-4
"""of a logit, as a part of the largest one: an order above what single precision loses in adding the weights first"""
COPY_AGAIN = "copy the adapter again"
RESTORE = f"restore it, or {COPY_AGAIN}"
OTHER_BASE = "name the base that it was trained on, or save the adapter again"
PROMPTS, LENGTH = 4, 16


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
    """The base that an adapter names; "" where it names none. A path counts from the working directory, as in peft,
    else from the adapter's or the folder that holds it."""
    config = read_record(directory / CONFIG, RESTORE)
    name = str(config.get("base_model_name_or_path") or "")
    if name and not Path(name).exists():
        for folder in (directory, directory.parent):
            if (folder / name).exists():
                return str(folder / name)
        revision = config.get("revision")
        if revision and "@" not in name and name.count("/") == 1:
            return f"{name}@{revision}"
    return name


def merge_into(model: Any, directory: Path, name: str, n_tokens: int = 0) -> Any:
    """The base with the adapter added; the model that was given is used up.

    model: in fp32, on the CPU.   n_tokens: of the adapter's own tokenizer, where those are more than its base's.

    Raises CheckpointError for what is no whole adapter of this base, and ProofError where the merged model's logits
    are not those that peft computes with the adapter beside the base.
    """
    import torch

    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(name, "it is an adapter, which needs the package peft", "pip install 'sftflow[lora]'")
    weights = _weights(directory, name)
    config = _config(directory, name)
    ends = _ends(model)
    was_tied = len(ends) == 2 and len({id(end.weight) for end in ends.values()}) == 1
    old, rows = _resize(model, weights, n_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all that peft warns of, we make sure below
        try:
            wrapped = _wrapped(model, config, weights, name)
            ids = _prompts(config, old, rows)
            with torch.no_grad():
                own = wrapped(input_ids=ids, use_cache=False).logits
            _part_shared_weights(wrapped)
            merged = wrapped.merge_and_unload()
        except (SftflowError, MemoryError):
            raise
        except Exception as error:  # of many kinds
            fact = f"it cannot be added to this base ({type(error).__name__}: {first_line(error)})"
            raise CheckpointError(name, fact, OTHER_BASE) from error
    if was_tied:
        _tie_equal_ends(merged)
    for which, end in _ends(merged).items():
        if not bool(end.weight[old:].isfinite().all()):
            fact = f"it has {rows} tokens, the base {old} rows, and the new rows of the {which} are not in the adapter"
            raise CheckpointError(
                name, fact, "name the base that has them, or save it again with save_embedding_layers=True"
            )
    with torch.no_grad():
        gap = float((merged(input_ids=ids, use_cache=False).logits - own).abs().max() / own.abs().max())
    if not gap <= TOLERANCE:
        fact = f"merged, its logits are off by {gap:.1e} of the largest one"
        raise ProofError(name, fact, "let peft run the adapter beside its base")
    for parameter in merged.parameters():  # peft freezes the base
        parameter.requires_grad_(True)
    return merged


def _weights(directory: Path, name: str) -> dict[str, Any]:
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


def _config(directory: Path, name: str) -> Any:
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
    config.inference_mode = True
    return config


def _ends(model: Any) -> dict[str, Any]:
    """The modules at both ends, by what errors call them."""
    ends = {"input embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {name: end for name, end in ends.items() if end is not None}


def _resize(model: Any, weights: dict[str, Any], n_tokens: int) -> tuple[int, int]:
    """Give the model as many rows as the adapter's own embeddings have, or its tokenizer tokens; (rows before, after).

    A new row is NaN until the adapter fills it.
    """
    import torch

    old = int(model.get_input_embeddings().weight.shape[0])
    names = [name for name, module in model.named_modules() if module in _ends(model).values()]
    inside = ("", "base_layer.", "modules_to_save.", "original_module.")
    keys = [f"base_model.model.{name}.{part}weight" for name in names for part in inside]
    rows = next((int(weights[key].shape[0]) for key in keys if key in weights), max(old, n_tokens))
    if rows != old:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for end in _ends(model).values():  # new modules
                end.weight[old:] = torch.nan
    return old, rows


def _wrapped(model: Any, config: Any, weights: dict[str, Any], name: str) -> Any:
    """The base with the adapter beside it. Raises CheckpointError naming a key that has no place, one that is left
    out, or a shape that does not fit."""
    from peft import PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict

    kind = PeftModelForCausalLM if config.task_type else PeftModel
    wrapped = kind(model, config).eval()
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    places = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
    for key in sorted(places.keys() & weights.keys()):
        if places[key].shape != weights[key].shape:
            shapes = f"{_shape(weights[key])}, in the base {_shape(places[key])}"
            raise CheckpointError(name, f"it does not fit this base ({key} is {shapes})", OTHER_BASE)
    missing = wanted.keys() - weights.keys()
    foreign = weights.keys() - places.keys()
    if not foreign:
        _refuse(name, "it leaves out {} that its config asks for", missing)
    try:
        result = set_peft_model_state_dict(wrapped, weights)
    except KeyError as error:
        _refuse(name, "the base has no place for {}", foreign)
        raise CheckpointError(name, f"it leaves out {error.args[0]}", OTHER_BASE) from error
    # Some keys are converted on the way (experts that transformers has fused), so that the names alone say nothing.
    # peft puts a name of its own into the keys; and what it saves twice, it reads once.
    strange = {key.replace(".default", "", 1) for key in result.unexpected_keys}
    _refuse(name, "the base has no place for {}", strange - places.keys())
    plain = {key for key in missing if wrapped.base_model.prefix not in key}  # biases, say: these are not converted
    _refuse(name, "it leaves out {} that its config asks for", [*_left_out(wrapped, result.missing_keys), *plain])
    held = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
    for key in sorted(held.keys() & weights.keys()):
        if not bool((held[key] == weights[key].to(held[key].dtype)).all()):
            fact = f"it brings two versions of a weight that the base has once ({key})"
            raise CheckpointError(
                name, fact, "save the base with tie_word_embeddings: false and both weights, and merge into that"
            )
    return wrapped


def _left_out(wrapped: Any, missing: list[str]) -> list[str]:
    """Those of the missing keys that are the adapter's, and under no other name what was loaded (layers may share)."""
    prefix, absent = f".{wrapped.base_model.prefix}", set(missing)
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in absent}
    return [key for key in missing if prefix in key and key in parameters and id(parameters[key]) not in loaded]


def _shape(weight: Any) -> str:
    return " x ".join(map(str, weight.shape))


def _refuse(name: str, fact: str, keys: Any) -> None:
    """Raises CheckpointError with the first of the keys, if there are any."""
    if not keys:
        return
    first, *more = sorted(keys)
    wrapper = next((w for w in WRAPPERS if f".{w}" in first), None)
    remedy = f"take {wrapper!r} out of its keys" if wrapper else OTHER_BASE
    raise CheckpointError(name, fact.format(f"{first} (and {len(more)} more)" if more else first), remedy)


def _prompts(config: Any, old: int, rows: int) -> Any:
    """(n, LENGTH) ids: random ones, and those whose rows the adapter may have changed alone."""
    import torch

    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    alone = {*range(old, rows), *_numbers(named)}
    draw = torch.Generator().manual_seed(0)
    random = torch.randint(rows, (PROMPTS * LENGTH,), generator=draw)
    special = torch.tensor(sorted(i for i in alone if 0 <= i < rows)[: 32 * LENGTH], dtype=torch.long)
    short = -len(special) % LENGTH
    return torch.cat([random, special, random[:short]]).view(-1, LENGTH)


def _numbers(value: Any) -> Iterator[int]:
    """All numbers in a list, or in an object of lists."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _part_shared_weights(model: Any) -> None:
    """Give every place of a weight that several share a copy of its own."""
    import torch

    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            seen.add(id(weight))


def _tie_equal_ends(model: Any) -> None:
    """One weight for embedding and head where both came out equal, else a config that says that they are two."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}
    settle_head(model)
