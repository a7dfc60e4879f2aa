"""LoRA (Hu et al. 2021): the base stays as it is, and beside each of its matrices W two narrow ones are trained.

    y = W x + scale * B A x,   A: (rank, in), B: (out, rank), at first 0;   scale = alpha / rank (rslora: / sqrt(rank))

peft wraps the layers; the trainer keeps the transformers model inside, whose packing, loss and loop are as ever.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sftflow.checkpoint.adapter_files import is_adapter
from sftflow.checkpoint.location import Location
from sftflow.foundation.errors import RecipeError, first_line
from sftflow.recipe import Lora
from sftflow.training.bf16_weights import decoder_layers

KEY = "train.lora"
ATTENTION = ("attn", "attention")


def attach(model: Any, asked: Lora, base: str, new_rows: Sequence[int], seed: int, revision: str | None = None) -> Any:
    """peft's model around `model`, which keeps its place inside: its adapter is trained, everything else frozen.

    base, revision: by which the adapter's config finds it again.   new_rows: ids of the tokens that the chat format has
    added, whose rows no base has.   seed: of A.   Raises RecipeError where peft is missing, a target is no layer, or
    new rows would be left out.
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(KEY, "it needs the package peft", "pip install 'sftflow[lora]'")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = target_names(model, asked.targets)
    ends = _ends(model)
    whole, rows = _embeddings(model, asked, new_rows)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        r=asked.rank,
        lora_alpha=int(asked.alpha) if asked.alpha == int(asked.alpha) else asked.alpha,
        lora_dropout=asked.dropout,
        use_rslora=asked.rslora,
        use_dora=asked.dora,
        target_modules=names,
        fan_in_fan_out=any(type(m) is Conv1D for m in model.modules()),
        modules_to_save=[_last(name) for name in ends] if whole else None,
        trainable_token_indices=dict.fromkeys(map(_last, ends), rows) if rows else None,
        ensure_weight_tying=(whole or bool(rows)) and is_tied(model),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they are of is proven on the logits before training
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(KEY, f"peft cannot wrap this base ({first_line(error)})", "name other targets") from error
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _ends(model: Any) -> list[str]:
    """The names of the embedding and of a head of its own."""
    ends = [model.get_input_embeddings(), *([] if is_tied(model) else [model.get_output_embeddings()])]
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _embeddings(model: Any, asked: Lora, new_rows: Sequence[int]) -> tuple[bool, list[int]]:
    """(whether both ends are trained whole, or else which rows of them)."""
    if asked.train_embeddings is False and new_rows:
        fact = f"the chat format adds {len(new_rows)} tokens, whose rows are in no base and would not be in the adapter"
        raise RecipeError(f"{KEY}.train_embeddings", fact, "set auto, or name a format whose tokens the base has")
    # An adapter has no place for single numbers of a head's bias: there both ends are saved whole.
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    whole = asked.train_embeddings is True or (bool(new_rows) and biased)
    return whole, [] if whole else sorted(new_rows)


def linear_layers(model: Any) -> dict[str, torch.nn.Module]:
    """The linear layers of the model's blocks, by their names."""
    inside = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
    kinds = (torch.nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) in inside}


def target_names(model: Any, targets: str | Sequence[str]) -> list[str]:
    """What peft calls the layers to adapt: the shortest endings of their names that no other layer has."""
    layers = list(linear_layers(model))
    if targets == "all":
        wanted = layers
    elif targets == "attention":
        wanted = [name for name in layers if any(part in piece for piece in name.split(".") for part in ATTENTION)]
    else:
        for target in targets:
            if not any(name.endswith(f".{target}") for name in layers):
                known = ", ".join(sorted({_last(name) for name in layers}))
                raise RecipeError(f"{KEY}.targets", f"no linear layer of the blocks is called {target!r}", known)
        wanted = [name for name in layers if any(name.endswith(f".{target}") for target in targets)]
    if not wanted:
        known = ", ".join(sorted({_last(name) for name in layers})) or "this base has none"
        raise RecipeError(f"{KEY}.targets", f"no linear layer is meant by {targets!r}", f"name some: {known}")
    every = [name for name, _ in model.named_modules()]
    for pieces in range(1, 4):
        endings = {".".join(name.split(".")[-pieces:]) for name in wanted}
        meant = [name for name in every if any(name == e or name.endswith(f".{e}") for e in endings)]
        if sorted(meant) == sorted(wanted):
            return sorted(endings)
    return wanted


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def without_adapter(model: Any, asked: Lora) -> int:
    """How many numbers of experts that are held as one tensor, and so are no linear layers, stay as they are where all
    layers were meant."""
    if asked.targets != "all":
        return 0
    return sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters() if p.ndim > 2)


def trainable_share(model: Any) -> tuple[int, int]:
    """(parameters that are trained, all)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def not_plain(wrapped: Any) -> list[str]:
    """What of an adapter vLLM or llama.cpp's converter do not take: they know A and B, and little else."""
    config = wrapped.peft_config["default"]
    rows = config.trainable_token_indices
    return [
        *([f"{len(next(iter(rows.values())))} new token rows"] if rows else []),
        *(["whole embeddings"] if config.modules_to_save else []),
        *(["DoRA's magnitudes"] if config.use_dora else []),
        *(["rslora's scale (llama.cpp would take alpha / rank)"] if config.use_rslora else []),
        *(["a base that is an adapter itself"] if is_adapter(Path(config.base_model_name_or_path)) else []),
    ]


def base_reference(location: Location) -> tuple[str, str | None]:
    """(what an adapter's config calls its base, its revision where one is named): a hub id or a built-in name as it
    is, a folder, a .gguf or a model_*.pt file by its whole path."""
    if location.from_hub:
        name, _, revision = location.name.partition("@")
        return name, revision or None
    if location.name.startswith("builtin:"):
        return location.name, None
    path = location.file if location.gguf or location.nanochat else Path(location.path)
    return str(path.resolve()), None
