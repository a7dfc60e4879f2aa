"""The recipe: frozen pydantic models, YAML in. What is wrong in one is told by `recipe_words`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sftflow.chat.columns import fault_of
from sftflow.chat.files.names import stem_of
from sftflow.foundation.counts import count_of
from sftflow.foundation.dotted_keys import set_key
from sftflow.foundation.errors import RecipeError, undecoded
from sftflow.foundation.missing import not_there
from sftflow.foundation.yaml_values import parse_yaml
from sftflow.recipe_words import Origin, told

_OWN_TASK = re.compile(r"(?s)(?!hub:)(.+\.py):(\w+)")


def own_task(source: str) -> tuple[str, str] | None:
    """(file, class) of a task in a user's file; None for what names none.

    >>> own_task("./tasks.py:riddles"), own_task("hub:me/tasks.py:train"), own_task("spelling")
    (('./tasks.py', 'riddles'), None, None)
    """
    found = _OWN_TASK.fullmatch(source)
    return (found[1], found[2]) if found else None


BUILTIN, RECIPES = "builtin:", Path(__file__).parent / "recipes"
"""what the names of recipes that come with the package begin with, and where these lie"""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, asked: ValidationInfo) -> Any:
        kind = str(cls.model_fields[str(asked.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in kind and ("int" in kind or "float" in kind):
            raise ValueError(f"it should be a number (given: {json.dumps(value)}); correct the value")
        return value


class SourceEntry(_Frozen):
    """One entry of the mixture: a built-in task, or conversations from a file.

    columns: of a table with other names, its own by ours: {question: prompt, answer: completion}.
    config, split: of a data set on the hub or in a folder, where its name does not say them; `split` also of a task.
    repeat: passes over its rows, 1 where None; where tokens are shared out (`data.shares`) the most that there may be.
    share: of the mixture's supervised tokens.   published: where a file is to be had, said where it is not there."""

    source: str
    path: str | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    limit: Annotated[int, Field(gt=0)] | None = None
    repeat: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    columns: dict[str, str] | None = None
    published: str | None = None
    place: Annotated[str | None, Field(exclude=True)] = None
    """what errors and ledgers call its rows where that is not the file: of rows that came from memory"""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        if fault := fault_of(columns or {}):
            raise ValueError(fault)
        return columns

    @property
    def label(self) -> str:
        """What it is called where it is the only one (`data.sources.labels_of`); it seeds which rows are held out."""
        own = own_task(self.source)
        return self.name or (
            own[1] if own else self.source if self.has_bare_name else stem_of(self.source, self.config)
        )

    @property
    def has_bare_name(self) -> bool:
        """Whether `source` has neither folder nor ending: a task's name, or where there is a `path`, just a name."""
        return "/" not in self.source and "." not in self.source and not self.source.startswith("hub:")


class HeldOut(_Frozen):
    """Rows of one's own for the held-out loss.

    files: entries as in the mixture, or just their names; all of their rows but those that are trained on, too.
    share: what is held out of each source of the mixture beside them, as `validation` says it where it is a number."""

    files: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @field_validator("files", mode="before")
    @classmethod
    def _named(cls, files: Any) -> Any:
        files = [files] if isinstance(files, str) else files
        return [{"source": f} if isinstance(f, str) else f for f in files] if isinstance(files, list | tuple) else files

    @field_validator("files")
    @classmethod
    def _not_trained_on(cls, files: tuple[SourceEntry, ...]) -> tuple[SourceEntry, ...]:
        for key in ("repeat", "share"):
            if any(getattr(entry, key) is not None for entry in files):
                raise ValueError(f"{key} is of rows that are trained on; leave it out")
        return files


class AssistantIdentity(_Frozen):
    name: str = "Pico"
    maker: str = "the sftflow project"
    skills: tuple[str, ...] | None = None
    """what it says that it can do; None: what the mixture's built-in tasks teach (`tasks.identity`)"""


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


class Lora(_Frozen):
    """An adapter beside the frozen base (`training.lora`).

    targets: all: every linear layer of the blocks; attention: those of the attention; or names of layers.
    train_embeddings: auto: the rows of tokens that the chat format has added; true: embedding and head whole.
    """

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32
    targets: Annotated[
        Literal["all", "attention"] | tuple[str, ...], Field(description="'all', 'attention' or a list of names")
    ] = "all"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    dora: bool = False
    train_embeddings: Annotated[Literal["auto"] | bool, Field(description="'auto', true or false")] = "auto"


class OfBase(_Frozen):
    """A learning rate as a multiple of the one that the base was trained with."""

    of_base: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Train(_Frozen):
    """How to train; the trainer takes this model itself, so an option is a field here and its use there.

    tokens_per_step: slots of the packed rows of one optimizer step.   micro_tokens: of them so many at once on the
    device, the rest is accumulated.   epochs, steps: the smaller wins.   clip: bound of the gradient's norm, 0: none.
    schedule: see `lr_factor`.   keep: saved states.
    overlong: what becomes of conversations longer than max_length: cut back to whole turns that fit (what has none is
    dropped), dropped, or cut after so many tokens (the end of a cut reply is then not taught).
    share_prefixes: equal beginnings in a step are computed once.   warm_start: take over the base's optimizer state.
    shard: whether each of several processes keeps a part of the model only; auto: where the whole would not fit.
    """

    out: str = "runs/sft"
    max_length: Annotated[int, Field(ge=8)] = 512
    tokens_per_step: Annotated[int, Field(gt=0)] = 8192
    micro_tokens: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] | OfBase,
        Field(description="'auto', a number above 0, or {of_base: 0.8}"),
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
    shard: Literal["auto", "no", "full"] = "auto"
    lr_scale: LrScale = LrScale()
    logger: Literal["tensorboard", "wandb", "trackio"] | None = None
    lora: Lora | None = None

    @property
    def peak_lr(self) -> float:
        """`lr` as a number: of a resolved recipe only."""
        if not isinstance(self.lr, float):
            raise ValueError("train.lr is still to be decided")
        return self.lr

    @field_validator("shard", mode="before")
    @classmethod
    def _no_in_yaml(cls, value: Any) -> Any:
        return "no" if value is False else value

    @model_validator(mode="after")
    def _fits(self) -> Train:
        for name in ("tokens_per_step", "micro_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.max_length:
                fact = f"{name} {value} is less than max_length {self.max_length}"
                raise ValueError(f"{fact}; raise train.{name}, or lower train.max_length")
        if self.warm_start and self.optimizer == "adamw8bit":
            raise ValueError("warm_start takes over no moments in 8 bits; set warm_start: false, or optimizer: adamw")
        if self.shard == "full" and self.optimizer == "adamw8bit":
            fact = "adamw8bit has 256 numbers to a scale, and which ones would hang on the number of processes"
            raise ValueError(f"{fact}; set optimizer: adamw, whose moments are sharded, too, or shard: no")
        if self.lora and self.optimizer == "muon":
            raise ValueError("muon orthogonalises whole weight matrices, and lora trains none; set optimizer: adamw")
        if self.lora and self.warm_start:
            raise ValueError("warm_start takes over moments of all weights, and lora trains none of them; leave it out")
        return self


class Eval(_Frozen):
    """every: also evaluate each so many steps, on `sample` items a task.   shots, samples, temperature, max_tokens,
    thinking: see `evaluation.options.How`."""

    tasks: tuple[str, ...] = ()
    limit: Annotated[int, Field(gt=0)] | None = 200
    allow_code: bool = False
    every: Annotated[int, Field(gt=0)] | None = None
    sample: Annotated[int, Field(gt=0)] = 16
    shots: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(gt=0)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    thinking: bool | None = None


class Compare(_Frozen):
    prompts: str = "default"
    judge: str | None = None
    judge_model: str | None = None


class Recipe(_Frozen):
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
        Annotated[float, Field(ge=0, allow_inf_nan=False), Tag("Number")] | Annotated[HeldOut, Tag("HeldOut")],
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
            files = value if isinstance(value, list) else [value]
            fact = f"it should be a share below 1, a number of rows, or {{files: [...]}} (given: {json.dumps(value)})"
            raise ValueError(f"{fact}; write {{files: {json.dumps(files)}}}")
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
