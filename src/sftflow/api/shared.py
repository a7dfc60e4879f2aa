"""What all verbs share: quiet libraries, one progress display, one way to say which recipe is meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.data.audit import item_parts
from sftflow.data.decontaminate import EvalSets
from sftflow.data.shares import check_shares
from sftflow.data.sources import check_source
from sftflow.evaluation.options import EvalOptions, EvalTask, How
from sftflow.foundation.dotted_keys import set_key
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.recipe import Eval, Recipe, SourceEntry, load_recipe, overridden, resolve_paths
from sftflow.recipe_words import Origin
from sftflow.report.progress import ProgressDisplay
from sftflow.tasks.identity import identity_of

RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""a recipe, the path of its YAML file, or its keys"""
ModelLike = str | Path | Assistant
"""a model as the command line names it, or a loaded one"""


class Drawing(str):
    """A picture for a notebook's cell: its HTML."""

    def _repr_html_(self) -> str:
        return str(self)


def eval_options(recipe: Recipe) -> EvalOptions:
    """What a recipe's models are asked."""
    asked = recipe.eval or Eval(limit=None)
    identity = identity_of(recipe.model_dump(mode="json"))
    how = How(**{f.name: getattr(asked, f.name) for f in fields(How)})
    return EvalOptions(tasks=asked.tasks, limit=asked.limit, allow_code=asked.allow_code, identity=identity, how=how)


def recipe_tasks(recipe: Recipe) -> list[EvalTask]:
    """The tasks that a recipe's models are asked. Raises as `EvalOptions.open`, and where it asks for none of them."""
    if recipe.eval is None:
        return []
    tasks = eval_options(recipe).open(recipe.base)
    if not tasks and recipe.compare is None:
        place = recipe.origin.place("eval", "tasks")
        raise RecipeError(place, "no task is named, and nothing is compared", "name one, or leave eval out")
    return tasks


def eval_sets(recipe: Recipe) -> EvalSets:
    """The items of a recipe's tasks, to be looked for in its rows. Nothing is asked, so no code of a model's runs."""
    tasks = replace(eval_options(recipe), allow_code=True).open(recipe.base)
    return {task.name: [item_parts(item) for item in task.items] for task in tasks}


def sets_to_drop(recipe: Recipe) -> EvalSets | None:
    """The same for `decontaminate: drop`; None where the recipe only asks for a report. Raises RecipeError where it has
    no task."""
    if recipe.decontaminate != "drop":
        return None
    found = eval_sets(recipe)
    if not found:
        place = recipe.origin.place("decontaminate")
        raise RecipeError(place, "there is no evaluation task to look for", "name some in eval.tasks, or leave it out")
    return found


def quiet() -> None:
    """Keep the libraries' own bars and warnings out of our progress lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.disable_progress_bar()
    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":  # it may have been imported before this was set
        transformers.logging.set_verbosity_error()


@contextmanager
def watching() -> Iterator[ProgressDisplay]:
    """The display of what is done: a bar in a terminal or a notebook."""
    quiet()
    with ProgressDisplay() as shown:
        yield shown


def parts_of(result: Any) -> dict[str, Any]:
    """A dataclass's fields, from which a subclass of it that can draw itself is made."""
    return {f.name: getattr(result, f.name) for f in fields(result)}


def name_of(model: ModelLike) -> str:
    """Raises CheckpointError for what is no model."""
    if not isinstance(model, ModelLike):
        fact = f"it should be a model (given: {type(model).__name__})"
        raise CheckpointError("model", fact, "give its name, its folder, or what sftflow.load returned")
    return model.name if isinstance(model, Assistant) else str(model)


def model_id(name: str) -> str:
    """What clients call a model by: the directory's name, or the hub id as it is.

    >>> model_id("HuggingFaceTB/SmolLM2-135M"), model_id("builtin:tiny")
    ('HuggingFaceTB/SmolLM2-135M', 'builtin:tiny')
    """
    if not Path(name).exists():
        return name
    path = Path(name).resolve()
    return path.parent.name if path.name == "checkpoint" else path.name


def recipe_of(
    recipe: RecipeLike | None,
    base: ModelLike | None,
    entries: Sequence[SourceEntry],
    keys: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> Recipe:
    """One recipe of all that was said: a recipe, and over it what was said by hand.

    keys: the recipe's own, those of its `train` by their own names, or dotted ones as `mixture.0.limit`.
    overrides: as `--set` has them.   Raises RecipeError as for a recipe's file.
    """
    if isinstance(recipe, str | Path):
        recipe, overrides = load_recipe(recipe, overrides), ()
    if isinstance(recipe, Recipe):
        data = {**recipe.model_dump(mode="json"), "mixture": [dict(entry) for entry in recipe.mixture]}
    elif recipe is None or isinstance(recipe, Mapping):
        data = dict(recipe or {})
    else:
        fact = f"it should be a recipe (given: {type(recipe).__name__})"
        raise RecipeError("recipe", fact, "give its file, or a mapping of its keys")
    if base is not None:
        data["base"] = name_of(base)
    if entries:
        data["mixture"] = tuple(entries)
    for key, value in keys.items():
        if key in Recipe.model_fields:
            data[key] = value
        elif "." in key:
            set_key(data, key, value, "recipe")
        elif isinstance(data.get("train") or {}, Mapping):
            # One that is known nowhere, too: it is named there, with its nearest neighbour.
            data["train"] = {**(data.get("train") or {}), key: value}
    origin = recipe.origin if isinstance(recipe, Recipe) else Origin()
    origin = replace(origin, arguments=frozenset(keys))
    made = resolve_paths(overridden(data, overrides, origin), Path.cwd())
    for number, entry in enumerate(made.sources):
        at = ("mixture", number) if number < len(made.mixture) else ("validation", "files", number - len(made.mixture))
        check_source(entry, made.origin.place(*at, "source"))
    check_shares(made)
    return made
