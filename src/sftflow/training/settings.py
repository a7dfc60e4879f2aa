"""What a recipe leaves to `auto`, decided and written down before training starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from sftflow.checkpoint import BUILTIN_TINY
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.foundation.ranks import ranks
from sftflow.foundation.runtime import Runtime, free_memory
from sftflow.recipe import OfBase, Recipe
from sftflow.training.base_rate import rate_of_base
from sftflow.training.optimizers import OPTIMIZERS

LORA_LR = 2e-4
"""lr: auto of an adapter: ten times that of full fine-tuning, as the field has it (Schulman et al. 2025, "LoRA Without
Regret")"""
SMALL_MODEL = 20_000_000
"""parameters below which a base is treated as the tiny one"""

# micro_tokens: null. What one forward pass takes: enough for efficient matrix products, and no more, since activations
# grow with it (0.8 MB a token in a 135M model in fp32, compiled).
AUTO_MICRO = {"small": 8192, "cpu": 1024, "cuda": 8192, "mps": 1024}

# compile: auto. Compiling takes half a minute on two cores (seconds, when cached); it is worth it for runs of more
# work than this. In floating-point operations and not seconds, so that a busy machine decides the same.
WORTH_COMPILING = {"cpu": 2e14, "cuda": 2e16}

# shard: auto. What a parameter takes in training: itself, its gradient and two moments; and the share of a device's
# memory that may go to them, the rest being for activations.
BYTES_A_PARAMETER, BYTES_A_FROZEN = 16, 4
REPLICATED_SHARE = 0.6


def resolve_recipe(
    recipe: Recipe,
    runtime: Runtime,
    n_parameters: int,
    info: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """Fill in what was left to `auto`, but `compile`; the notes say how each was decided.   info, meta: what the base
    records (see `rate_of_base`)."""
    train = recipe.train
    require_optimizer(train.optimizer, runtime.device)
    small = recipe.base == BUILTIN_TINY or n_parameters < SMALL_MODEL
    update: dict[str, Any] = {"precision": runtime.precision}
    notes = {"precision": runtime.reason, "device": runtime.device}
    if train.lr == "auto":
        kind = OPTIMIZERS[train.optimizer]
        update["lr"] = LORA_LR if train.lora else kind.lr_tiny if small else kind.lr_real
        full = "tuned for the tiny base" if small else "full fine-tuning of a real checkpoint"
        notes["lr"] = f"auto: {'an adapter' if train.lora else full}"
    elif isinstance(train.lr, OfBase):
        update["lr"], notes["lr"] = rate_of_base(recipe, info or {}, meta)
    if train.shard == "auto" and ranks().world > 1:
        update["shard"], notes["shard"] = decide_shard(
            n_parameters, runtime, train.optimizer, lora=train.lora is not None
        )
    if ranks().world > 1 and update.get("shard", train.shard) == "full" and recipe.eval and recipe.eval.every:
        fact = "no rank has the whole of a sharded model, to ask it while it trains"
        raise RecipeError(recipe.origin.place("eval", "every"), fact, "leave it out, or set train.shard: no")
    if train.micro_tokens is None:
        wanted = AUTO_MICRO["small" if small else runtime.device]
        update["micro_tokens"] = min(train.tokens_per_step, max(wanted, train.max_length))
    if train.epochs is None and train.steps is None:
        update["epochs"] = 1.0
    return recipe.model_copy(update={"train": train.model_copy(update=update)}), notes


def decide_shard(
    n_parameters: int, runtime: Runtime, optimizer: str = "adamw", *, lora: bool = False
) -> tuple[str, str]:
    """("full" or "no", why): whether weights, gradients and AdamW's two moments, all in fp32, fit the memory that each
    process has. On a CPU the processes of a machine share it."""
    if optimizer == "adamw8bit":
        return "no", "auto: adamw8bit is never sharded"
    needed = (BYTES_A_FROZEN if lora else BYTES_A_PARAMETER) * n_parameters
    if runtime.device == "cuda":
        room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        room = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks().world))
    room = ranks().from_first(room)  # all must decide the same
    fits = not room or needed <= REPLICATED_SHARE * room
    fact = f"{needed / 2**30:.1f} GiB for weights, gradients and moments, {room / 2**30:.0f} GiB for each process"
    return "no" if fits else "full", f"auto: {fact}"


def can_compile(device: str) -> str | None:
    """None where torch.compile has what it needs on this device, else what is missing."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "no triton"
    if device == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
        return None if any(c and shutil.which(c) for c in compilers) else "no C++ compiler"
    return f"not for {device}"


def require_optimizer(name: str, device: str) -> None:
    """Raises RecipeError where the optimizer cannot take a step on this device."""
    if name != "adamw8bit":
        return
    if importlib.util.find_spec("torchao") is None:
        remedy = "pip install 'sftflow[adamw8bit]', or set adamw"
        raise RecipeError("train.optimizer", "adamw8bit is torchao's, which is not installed", remedy)
    if missing := can_compile(device):
        fact = f"adamw8bit compiles its step, and torch.compile cannot work here: {missing}"
        raise RecipeError(
            "train.optimizer", fact, "install it, or set adamw" if missing.startswith("no ") else "set adamw"
        )


def decide_compile(recipe: Recipe, runtime: Runtime, n_parameters: int, steps: int) -> tuple[Recipe, str]:
    """The recipe with `train.compile` true or false, and why. Raises RecipeError where it cannot do what is asked."""
    asked = recipe.train.compile
    missing = can_compile(runtime.device)
    if asked is True and missing:
        remedy = "install it, or set auto" if missing.startswith("no ") else "set auto"
        raise RecipeError("train.compile", f"torch.compile cannot work here: {missing}", remedy)
    work = 6.0 * n_parameters * steps * recipe.train.tokens_per_step
    worth = work >= WORTH_COMPILING.get(runtime.device, float("inf"))
    decided = asked is True or (asked == "auto" and worth and missing is None)
    if asked != "auto":
        why = "asked for"
    elif missing:
        why = f"auto: {missing}"
    else:
        why = f"auto: {work:.0e} floating-point operations are {'' if worth else 'not '}worth it"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": decided})}), why


def check_context(model: Any, max_length: int) -> None:
    """Raises CheckpointError where conversations may be longer than the base can read."""
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    if context and max_length > context:
        fact = f"{max_length} is more than the base's context of {context}"
        raise CheckpointError("train.max_length", fact, "lower it")


def set_dropout(model: Any, rate: float) -> None:
    """Dropout is 0 unless the recipe asks: set every dropout of the model, however it is kept."""
    for place in (*model.modules(), model.config):
        if isinstance(place, torch.nn.Dropout):
            place.p = rate
        for key, value in list(vars(place).items()):
            named = "dropout" in key or key in ("attn_pdrop", "resid_pdrop", "embd_pdrop")
            if named and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(place, key, rate)
