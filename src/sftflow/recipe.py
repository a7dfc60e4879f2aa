"""The recipe: frozen pydantic models, YAML in. An unknown key is an error that names its nearest neighbour."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sftflow.foundation.dotted_keys import set_key
from sftflow.foundation.errors import RecipeError, first_line


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceEntry(_Frozen):
    """One entry of the mixture: a built-in task, or conversations from a file."""

    source: str
    path: str | None = None
    name: str | None = None
    split: str = "train"
    limit: Annotated[int, Field(gt=0)] | None = None
    repeat: Annotated[int, Field(ge=1)] = 1
    place: Annotated[str | None, Field(exclude=True)] = None
    """what errors and ledgers call its rows where that is not the file: of rows that came from memory"""

    @property
    def label(self) -> str:
        """What it is called where it is the only one (`data.sources.labels_of`); it seeds which rows are held out."""
        return self.name or (self.source if self.has_bare_name else Path(self.source).stem)

    @property
    def has_bare_name(self) -> bool:
        """Whether `source` has neither folder nor ending: a task's name, or where there is a `path`, just a name."""
        return "/" not in self.source and "." not in self.source


class AssistantIdentity(_Frozen):
    name: str = "Pico"
    maker: str = "the sftflow project"


class Schedule(_Frozen):
    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    warmdown: Annotated[float, Field(ge=0, le=1)] = 0.5
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class LrScale(_Frozen):
    """Learning rates of the parameter groups, as multiples of the recipe's."""

    matrices: Annotated[float, Field(ge=0)] = 1.0
    embeddings: Annotated[float, Field(ge=0)] = 1.0
    rest: Annotated[float, Field(ge=0)] = 1.0


class Train(_Frozen):
    """How to train; the trainer takes this model itself, so an option is a field here and its use there.

    tokens_per_step: slots of the packed rows of one optimizer step.   micro_tokens: of them so many at once on the
    device, the rest is accumulated.   epochs, steps: the smaller wins.   clip: bound of the gradient's norm, 0: none.
    schedule: see `lr_factor`.   keep: saved states.
    overlong: what becomes of conversations longer than max_length: cut back to whole turns that fit (what has none is
    dropped), dropped, or cut after so many tokens (the end of a cut reply is then not taught).
    share_prefixes: equal beginnings in a step are computed once.   warm_start: take over the base's optimizer state.
    """

    out: str = "runs/sft"
    max_length: Annotated[int, Field(ge=8)] = 512
    tokens_per_step: Annotated[int, Field(gt=0)] = 8192
    micro_tokens: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)],
        Field(description="'auto' or a number above 0"),
    ] = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    schedule: Schedule = Schedule()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    overlong: Literal["cut", "drop", "cut_tokens"] = "cut"
    save_every: Annotated[int, Field(gt=0)] = 200
    keep: Annotated[int, Field(ge=1)] = 2
    best: Literal["validation_loss", "last"] = "validation_loss"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    compile: Annotated[Literal["auto"] | bool, Field(description="'auto', true or false")] = "auto"
    packing: bool = True
    share_prefixes: bool = True
    gradient_checkpointing: bool = False
    warm_start: bool = False
    lr_scale: LrScale = LrScale()
    logger: Literal["tensorboard", "wandb", "trackio"] | None = None
    lora: None = None

    @property
    def peak_lr(self) -> float:
        """`lr` as a number: of a resolved recipe only."""
        if isinstance(self.lr, str):
            raise ValueError("train.lr is still to be decided")
        return self.lr

    @field_validator("lora", mode="before")
    @classmethod
    def _not_yet(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("not available in this version; leave it null")

    @model_validator(mode="after")
    def _fits(self) -> Train:
        if self.tokens_per_step < self.max_length:
            raise ValueError(f"tokens_per_step {self.tokens_per_step} is less than max_length {self.max_length}")
        if self.micro_tokens is not None and self.micro_tokens < self.max_length:
            raise ValueError(f"micro_tokens {self.micro_tokens} is less than max_length {self.max_length}")
        return self


class Eval(_Frozen):
    """every: also evaluate each so many steps, on `sample` items a task."""

    tasks: tuple[str, ...] = ()
    limit: Annotated[int, Field(gt=0)] | None = 200
    allow_code: bool = False
    every: Annotated[int, Field(gt=0)] | None = None
    sample: Annotated[int, Field(gt=0)] = 16


class Compare(_Frozen):
    prompts: str = "default"
    judge: str | None = None
    judge_model: str | None = None


class Recipe(_Frozen):
    """A whole run. Paths are relative to the recipe's file, except train.out (current directory).

    max_dropped: the largest share of a source's rows that may be lost (too long, or bad); more is an error."""

    base: str = "builtin:tiny"
    format: str = "auto"
    append_eos: bool = False
    drop_prefill: bool = False
    mixture: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    identity: AssistantIdentity = AssistantIdentity()
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    validation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    train: Train = Train()
    eval: Eval | None = None
    compare: Compare | None = None

    @field_validator("mixture")
    @classmethod
    def _no_name_twice(cls, mixture: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
        names = [entry.name for entry in mixture if entry.name]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources have the name {name!r}")
        return mixture


def _model_at(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    """The model of a place of the recipe: its fields are the keys that are known there."""
    for step in location:
        if isinstance(step, int) or step not in model.model_fields:
            continue
        annotation = model.model_fields[step].annotation
        kinds = (annotation, *get_args(annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def parse_recipe(data: Any, place: str) -> Recipe:
    """Validate a recipe. Raises RecipeError with the first mistake: place, fact, remedy."""
    if not isinstance(data, dict):
        raise RecipeError(place, "a recipe is a mapping of keys", "see the README's example")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = tuple(first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "literal_error" and str(location[-1]).startswith("literal["):
            # one of several kinds of value, of which each has its own error
            location = location[:-1]
            message = f"it should be {_model_at(Recipe, location[:-1]).model_fields[str(location[-1])].description}"
        path = ".".join(map(str, location))
        if first["type"] == "extra_forbidden":
            known = list(_model_at(Recipe, location[:-1]).model_fields)
            near = difflib.get_close_matches(str(location[-1]), known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise RecipeError(f"{place}: {path}", "unknown key", hint) from None
        if first["type"] == "missing":
            raise RecipeError(f"{place}: {path}", "this key is missing", "add it") from None
        given = json.dumps(first.get("input"), default=str, ensure_ascii=False)
        given = given if len(given) < 60 else given[:57] + "..."
        raise RecipeError(f"{place}: {path}", f"{message} (given: {given})", "correct the value") from None


def load_recipe(path: str | Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `key.sub=value` overrides, make its paths absolute: the file's as seen from its folder,
    those of overrides as seen from the current one."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError(str(path), "no such recipe", "give the path of a YAML file")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(where, f"not YAML ({getattr(error, 'problem', error)})", "fix the line") from None
    except UnicodeDecodeError:
        raise RecipeError(str(path), "not UTF-8 text", "convert it") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # what YAML makes of a date of no calendar
        raise RecipeError(str(path), f"not YAML ({first_line(error)})", "fix the value") from None
    recipe = overridden(data, overrides or [], str(path))
    return resolve_paths(recipe, file.resolve().parent, [said.partition("=")[0].strip() for said in overrides or []])


def overridden(data: Any, overrides: Sequence[str], place: str) -> Recipe:
    """Validate a recipe with `train.steps=30` or `mixture.0.limit=5` set in it; values are YAML, `data` stays as it is.

    Raises RecipeError, which names the `--set` where it is at fault.
    """
    changed, keys = copy.copy(data), dict[str, str]()
    for override in overrides:
        key, found, value = override.partition("=")
        said = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        if not found or not all(key.strip().split(".")):
            raise RecipeError(said, "it is not key=value", "write for example --set train.steps=30")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
            raise RecipeError(said, "the value is not YAML", "quote it") from None
        if isinstance(changed, dict):
            set_key(changed, key.strip(), parsed, said)
        keys[f"{key.strip()}."] = said
    try:
        return parse_recipe(changed, place)
    except RecipeError as error:
        wrong = error.place.removeprefix(f"{place}: ")
        near = [said for key, said in keys.items() if key.startswith(f"{wrong}.") or f"{wrong}.".startswith(key)]
        try:
            parse_recipe(data, place)
        except RecipeError as own:
            near = near if str(own) != str(error) else []
        raise RecipeError(f"{near[-1]}: {wrong}" if near else error.place, error.fact, error.remedy) from None


def resolve_paths(recipe: Recipe, folder: Path, typed: Sequence[str] = ()) -> Recipe:
    """Relative paths of data, base and prompts become absolute, seen from the recipe's folder.

    typed: keys that were given on the command line, where a path is seen from the current folder.
    """

    def home(key: str) -> Path:
        return Path.cwd() if any(f"{key}.".startswith(f"{one}.") for one in typed) else folder

    def absolute(value: str, key: str) -> str:
        return value if value.startswith("hub:") or Path(value).is_absolute() else str(home(key) / value)

    entries = []
    for number, entry in enumerate(recipe.mixture):
        if entry.path is not None:
            entry = entry.model_copy(update={"path": absolute(entry.path, f"mixture.{number}.path")})
        elif not entry.has_bare_name:
            entry = entry.model_copy(update={"source": absolute(entry.source, f"mixture.{number}.source")})
        entries.append(entry)
    update: dict[str, Any] = {"mixture": tuple(entries)}
    base = recipe.base
    if not base.startswith("builtin:") and (
        os.path.exists(home("base") / base) or base.startswith((".", "/")) or base.endswith(".gguf")
    ):
        update["base"] = absolute(base, "base")
    if recipe.eval is not None:
        tasks = []
        for number, task in enumerate(recipe.eval.tasks):
            name, found, path = task.partition("=")
            tasks.append(f"{name}={absolute(path, f'eval.tasks.{number}')}" if found else task)
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
