"""`train.lr: {of_base: 0.8}`: a learning rate as a multiple of the one that the base records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftflow.foundation.errors import RecipeError
from sftflow.recipe import OfBase, Recipe
from sftflow.training.optimizers import MUON_RATIO


def rate_of_base(recipe: Recipe, info: Mapping[str, Any], meta: Mapping[str, Any] | None) -> tuple[float, str]:
    """(the rate, how it came about).   info: the base's sftflow.json.   meta: of a base directory of picollm or
    nanochat, its meta_*.json.

    Raises RecipeError where the base records no rate, or that of another optimizer, which says nothing of this one's.
    """
    train, place = recipe.train, recipe.origin.place("train", "lr")
    assert isinstance(train.lr, OfBase)
    found = _recorded(info, meta or {})
    if found is None:
        raise RecipeError(place, f"{recipe.base} does not record its learning rate", "write a number, or auto")
    rate, whose = found
    own = _kind(train.optimizer, train.lora is not None)
    if whose != own:
        fact = f"{recipe.base} was trained with {whose}, whose rate says nothing of {own}'s"
        remedy = (
            "write a number" if "lora" in whose or train.lora else f"set train.optimizer: {whose}, or write a number"
        )
        raise RecipeError(place, fact, remedy)
    return rate * train.lr.of_base, f"{train.lr.of_base:g} of the base's {rate:g}"


def _recorded(info: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[float, str] | None:
    """(`train.lr` as it would say the base's rate, the kind of training it was), where that stands there."""
    trained = (info.get("recipe") or {}).get("train") or {}
    pretrained = (info.get("card") or {}).get("spec") or {}
    theirs = (meta.get("user_config") or {}).get("matrix_lr")
    if isinstance(trained.get("lr"), float):
        return trained["lr"], _kind(trained.get("optimizer", "adamw"), bool(trained.get("lora")))
    if isinstance(pretrained.get("lr"), float):
        return pretrained["lr"], "muon"
    return (theirs / MUON_RATIO, "muon") if isinstance(theirs, float) else None


def _kind(optimizer: str, lora: bool) -> str:
    return f"{optimizer.removesuffix('8bit')}{' and lora' * lora}"
