"""Adapters of peft added into their bases, proven on the logits.

peft wraps the base; what the wrapped model computes is the truth. Then the weights are added into the base's own, and
the result must compute the same. Weights that the base shares (a tied head) are parted first, so that what the adapter
adds to one end stays out of the other; they are tied again where both ends come out equal.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.checkpoint.adapter_files import read_config, read_weights
from sftflow.checkpoint.weights import WRAPPERS, settle_head
from sftflow.foundation.errors import CheckpointError, ProofError, SftflowError, first_line

TOLERANCE = 1e-4
"""of a logit, as a part of the largest one: an order above what single precision loses in adding the weights first"""
OTHER_BASE = "name the base that it was trained on, or save the adapter again"
PROMPTS, LENGTH = 4, 16


@dataclass(frozen=True)
class Unmerged:
    """What peft computes with an adapter beside its base.

    ids: (n, LENGTH) of prompts.   logits: (n, LENGTH, rows) over them.   largest: of these, by size.
    moved: the largest change of a logit that the adapter makes in its base.
    """

    ids: Any
    logits: Any
    largest: float
    moved: float

    def off_by(self, model: Any) -> float:
        """The largest difference between a logit of `model` and peft's; NaN where one is none."""
        return float((_logits(model, self.ids) - self.logits).abs().max())


def merge_into(
    model: Any, directory: Path, name: str, n_tokens: int = 0, padding: Collection[int] = ()
) -> tuple[Any, Unmerged]:
    """The base with the adapter added, and what it was compared with; the model that was given is used up.

    model: in fp32, on the CPU.   n_tokens: of the adapter's own tokenizer, where those are more than its base's.
    padding: those of them that nothing is trained on; where the adapter has no rows for them, they are the mean row.

    Raises CheckpointError for what is no whole adapter of this base, and ProofError where the merged model's logits
    are not those that peft computes with the adapter beside the base.
    """
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(name, "it is an adapter, which needs the package peft", "pip install 'sftflow[lora]'")
    weights = read_weights(directory, name)
    config = read_config(directory, name)
    ends = _ends(model)
    was_tied = len(ends) == 2 and len({id(end.weight) for end in ends.values()}) == 1
    old, rows = _resize(model, weights, n_tokens, padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all that peft warns of, we make sure below
        try:
            ids = _prompts(config, old, rows)
            before = _logits(model, ids)
            wrapped = _wrapped(model, config, weights, name)
            own = _logits(wrapped, ids)
            _part_shared_weights(wrapped)
            _merge_inner_tokens(wrapped)
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
    moved = float((own - before).nan_to_num(0.0).abs().max())  # what a new row was before is no number
    unmerged = Unmerged(ids, own, float(own.abs().max()), moved)
    require_near(
        unmerged, unmerged.off_by(merged), TOLERANCE, name, "merged", "let peft run the adapter beside its base"
    )
    for parameter in merged.parameters():  # peft freezes the base
        parameter.requires_grad_(True)
    return merged, unmerged


def require_near(unmerged: Unmerged, off: float, part: float, name: str, how: str, remedy: str) -> None:
    """Raises ProofError where logits are off by more than this part of the largest one.   how: what was done before."""
    if not off <= part * unmerged.largest:
        fact = f"{how}, its logits are off by {off / unmerged.largest:.1e} of the largest one, allowed are {part:.0e}"
        raise ProofError(name, fact, remedy)


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _ends(model: Any) -> dict[str, Any]:
    """The modules at both ends, by what errors call them."""
    ends = {"input embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {name: end for name, end in ends.items() if end is not None}


def _resize(model: Any, weights: dict[str, Any], n_tokens: int, padding: Collection[int]) -> tuple[int, int]:
    """Give the model as many rows as the adapter's own embeddings have, or its tokenizer tokens; (rows before, after).

    A new row is NaN until the adapter fills it; one of `padding` is the mean.
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
                end.weight[[i for i in padding if i >= old]] = end.weight[:old].mean(0)
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


def _merge_inner_tokens(model: Any) -> None:
    """Merge trained tokens that lie inside another layer of the adapter: peft's own merging passes by them."""
    from peft.utils.other import TrainableTokensWrapper

    for module in list(model.modules()):
        if isinstance(inner := getattr(module, "base_layer", None), TrainableTokensWrapper):
            module.base_layer = inner.unload_and_optionally_merge_module(True, False, None)


def _tie_equal_ends(model: Any) -> None:
    """One weight for embedding and head where both came out equal, else a config that says that they are two."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}
    settle_head(model)
