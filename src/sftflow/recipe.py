"""The recipe: a frozen pydantic model, YAML in; its parts are those of `recipe_keys`. What is wrong in one is told by
`recipe_words`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from sftflow.foundation.counts import count_of
from sftflow.foundation.dotted_keys import set_key
from sftflow.foundation.errors import RecipeError, undecoded
from sftflow.foundation.missing import not_there
from sftflow.foundation.yaml_values import parse_yaml
from sftflow.recipe_keys import (
    REPLAY,
    AssistantIdentity,
    Compare,
    Eval,
    Frozen,
    Held,
    HeldOut,
    Lora,
    LrScale,
    OfBase,
    Schedule,
    SourceEntry,
    Train,
    own_task,
)
from sftflow.recipe_words import Origin, told

__all__ = [
    "REPLAY",
    "AssistantIdentity",
    "Compare",
    "Eval",
    "HeldOut",
    "Lora",
    "LrScale",
    "OfBase",
    "Recipe",
    "Schedule",
    "SourceEntry",
    "Train",
    "load_recipe",
    "overridden",
    "own_task",
    "parse_recipe",
    "resolve_paths",
    "to_yaml",
]

BUILTIN, RECIPES = "builtin:", Path(__file__).parent / "recipes"
"""what the names of recipes that come with the package begin with, and where these lie"""


class Recipe(Frozen):
    """A whole run. Paths are relative to the recipe's file, except train.out (current directory).

    tokens, mixing_temperature: how supervised tokens are shared out (`data.shares`).   order: of the rows of an epoch;
    listed: source after source.   decontaminate: whether rows that overlap with the evaluation tasks are left out.
    supervise: what the loss is taken on: replies, or every token after the first, whoever wrote it (messages of
    weight 0 stay out).   turns: all replies, or each conversation's last.   join_turns: messages in a row of the user,
    and of the assistant, are joined.   max_dropped: the largest share of a source's rows that may be lost (too long, or
    bad); more is an error."""

    base: str = "builtin:tiny"
    format: str = "auto"
    append_eos: bool = False
    drop_prefill: bool = False
    mixture: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    tokens: Annotated[int, BeforeValidator(count_of)] | None = None
    mixing_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    order: Literal["shuffled", "listed"] = "shuffled"
    decontaminate: Literal["report", "drop"] = "report"
    identity: AssistantIdentity = AssistantIdentity()
    supervise: Literal["replies", "all"] = "replies"
    turns: Literal["all", "last"] = "all"
    join_turns: bool = False
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    validation: Annotated[
        Annotated[Held, Tag("Number")] | Annotated[HeldOut, Tag("HeldOut")],
        Discriminator(lambda value: "HeldOut" if isinstance(value, dict | HeldOut) else "Number"),
    ] = 0.01
    train: Train = Train()
    eval: Eval | None = None
    compare: Compare | None = None
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where its values were written, for errors: `recipe.origin.place("eval", "tasks")`."""
        return self._origin

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        if self.turns == "last" and self.supervise == "all":
            raise ValueError("turns: last teaches a reply, and supervise: all every token; leave one of them out")
        return self

    @property
    def sources(self) -> tuple[SourceEntry, ...]:
        """The mixture, and behind it what is only held out."""
        return self.mixture + (self.validation.files if isinstance(self.validation, HeldOut) else ())

    @property
    def held_out_share(self) -> float:
        """Of each source of the mixture: a share below 1, or a number of rows."""
        return self.validation.share if isinstance(self.validation, HeldOut) else self.validation

    @field_validator("validation", mode="before")
    @classmethod
    def _files_are_named_so(cls, value: Any) -> Any:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return float(value)
        if isinstance(value, str | list):
            files = json.dumps(value if isinstance(value, list) else [value])
            fact = f"it should be a share below 1, a number of rows, or {{files: [...]}} (given: {files[1:-1][:60]})"
            raise ValueError(f"{fact}; write {{files: {files if len(files) < 60 else '[...]'}}}")
        return value

    @field_validator("mixture")
    @classmethod
    def _no_name_twice(cls, mixture: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
        names = [entry.name for entry in mixture if entry.name]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources have the name {name!r}; give each a name of its own")
        return mixture


def parse_recipe(data: Any, origin: str | Origin) -> Recipe:
    """Validate a recipe. Raises RecipeError with the first mistake: place, fact, remedy.

    origin: where its values were written, or just what it is called.
    """
    if isinstance(origin, str):
        origin = Origin(origin)
    if not isinstance(data, dict):
        fact = "it is empty" if data is None else "a recipe is a mapping of keys"
        raise RecipeError(origin.file, fact, "write for example mixture: [{source: data.jsonl}]")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise told(error, Recipe, origin) from None
    recipe._origin = origin
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `key.sub=value` overrides, make its paths absolute: the file's as seen from its folder,
    those of overrides, and of a built-in recipe (`builtin:demo`), as seen from the current one."""
    file, folder = Path(path), None
    if str(path).startswith(BUILTIN):
        file, folder = RECIPES / f"{str(path).removeprefix(BUILTIN)}.yaml", Path.cwd()
        if not file.is_file():
            known = ", ".join(BUILTIN + one.stem for one in sorted(RECIPES.glob("*.yaml")))
            raise RecipeError(str(path), "no such built-in recipe", f"known: {known}")
    if not file.is_file():
        inside = next((f", as {found}" for found in sorted(file.glob("*.y*ml"))), "") if file.is_dir() else ""
        raise RecipeError(str(path), *not_there(file, "recipe", f"give the path of a YAML file{inside}"))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(str(path), "not UTF-8 text", "save it as UTF-8") from None
    data = parse_yaml(text, str(path))
    return resolve_paths(overridden(data, overrides or [], Origin(str(path), text)), folder or file.resolve().parent)


def overridden(data: Any, overrides: Sequence[str], origin: Origin) -> Recipe:
    """Validate a recipe with `train.steps=30` or `mixture.0.limit=5` set in it; values are YAML, `data` stays as it is.

    Raises RecipeError, which names the `--set` where it is at fault.
    """
    changed, sets = copy.copy(data), []
    for override in overrides:
        key, found, value = override.partition("=")
        said = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        if any("\ud800" <= letter <= "\udfff" for letter in override):
            raise RecipeError(ascii(said)[1:-1], *undecoded())
        if not found or not all(key.strip().split(".")):
            raise RecipeError(said, "it is not key=value", "write for example --set train.steps=30")
        parsed = parse_yaml(value, said)
        if isinstance(changed, dict):
            set_key(changed, key.strip(), parsed, said)
        sets.append((key.strip(), said))
    try:
        return parse_recipe(changed, replace(origin, sets=(*origin.sets, *sets)))
    except RecipeError as error:
        wrong = error.place.rpartition(": ")[2]
        below = [said for key, said in sets if key.startswith(f"{wrong}.")]  # of keys that do not fit together
        if not below or error.place.startswith("--set "):
            raise
        try:
            parse_recipe(data, origin)
        except RecipeError as own:
            if str(own) == str(error):
                raise own from None
        raise RecipeError(f"{below[-1]}: {wrong}", error.fact, error.remedy) from None


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Relative paths of data, base and prompts become absolute: seen from the recipe's folder, or from the current one
    where they were typed behind `--set`."""
    typed = [key for key, _ in recipe.origin.sets]

    def home(key: str) -> Path:
        return Path.cwd() if any(f"{key}.".startswith(f"{one}.") for one in typed) else folder

    def absolute(value: str, key: str) -> str:
        value = os.path.expanduser(value)
        if value == REPLAY:
            return value
        if value.startswith("hub:"):  # of a set in a folder
            here = home(key) / value[4:].partition(":")[0]
            return f"hub:{home(key)}/{value[4:]}" if here.is_dir() and not os.path.isabs(value[4:]) else value
        return value if Path(value).is_absolute() else str(home(key) / value)

    def placed(entry: SourceEntry, key: str) -> SourceEntry:
        if entry.path is not None:
            entry = entry.model_copy(update={"path": absolute(entry.path, f"{key}.path")})
        if not entry.has_bare_name and (entry.path is None or own_task(entry.source)):
            entry = entry.model_copy(update={"source": absolute(entry.source, f"{key}.source")})
        return entry

    entries = [placed(entry, f"mixture.{number}") for number, entry in enumerate(recipe.mixture)]
    train = recipe.train.model_copy(update={"out": os.path.expanduser(recipe.train.out)})
    update: dict[str, Any] = {"mixture": tuple(entries), "train": train}
    if isinstance(held := recipe.validation, HeldOut):
        files = tuple(placed(entry, f"validation.files.{number}") for number, entry in enumerate(held.files))
        update["validation"] = held.model_copy(update={"files": files})
    base = recipe.base
    if not base.startswith("builtin:") and (
        os.path.exists(home("base") / base) or base.startswith((".", "/")) or base.endswith(".gguf")
    ):
        update["base"] = absolute(base, "base")
    if recipe.eval is not None:
        tasks = []
        for number, task in enumerate(recipe.eval.tasks):
            name, found, path = task.partition("=")
            name = absolute(name, f"eval.tasks.{number}") if name.endswith(".py") or own_task(name) else name
            tasks.append(f"{name}={absolute(path, f'eval.tasks.{number}')}" if found else name)
        update["eval"] = recipe.eval.model_copy(update={"tasks": tuple(tasks)})
    if recipe.compare is not None and recipe.compare.prompts != "default":
        update["compare"] = recipe.compare.model_copy(
            update={"prompts": absolute(recipe.compare.prompts, "compare.prompts")}
        )
    if recipe.format.endswith(".jinja"):
        update["format"] = absolute(recipe.format, "format")
    return recipe.model_copy(update=update)


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
