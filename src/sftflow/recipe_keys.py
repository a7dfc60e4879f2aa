"""The parts of a recipe, frozen pydantic models: a source of the mixture, how to train, evaluate and compare."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sftflow.chat.columns import fault_of
from sftflow.chat.files.names import stem_of

_OWN_TASK = re.compile(r"(?s)(?!hub:)(.+\.py):(\w+)")


TEXT = "text"
"""the source whose rows are plain text"""
REPLAY = "builtin:replay"
"""the path of the text that comes with the package"""


def own_task(source: str) -> tuple[str, str] | None:
    """(file, class) of a task in a user's file; None for what names none.

    >>> own_task("./tasks.py:riddles"), own_task("hub:me/tasks.py:train"), own_task("spelling")
    (('./tasks.py', 'riddles'), None, None)
    """
    found = _OWN_TASK.fullmatch(source)
    return (found[1], found[2]) if found else None


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, asked: ValidationInfo) -> Any:
        kind = str(cls.model_fields[str(asked.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in kind and ("int" in kind or "float" in kind):
            raise ValueError(f"it should be a number (given: {json.dumps(value)}); correct the value")
        return value


class SourceEntry(Frozen):
    """One entry of the mixture: a built-in task, conversations from a file, or plain text (`source: text` with a path;
    `source: builtin:replay` is short for its path).

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

    @model_validator(mode="before")
    @classmethod
    def _text_by_its_path(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("source") == REPLAY and value.get("path") is None:
            return {**value, "source": TEXT, "path": REPLAY}
        return value

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
        if self.is_text and self.path and not self.name:
            return stem_of(self.path.removeprefix("builtin:"), self.config)
        return self.name or (
            own[1] if own else self.source if self.has_bare_name else stem_of(self.source, self.config)
        )

    @property
    def is_text(self) -> bool:
        """Whether its rows are plain text."""
        return self.source == TEXT

    @property
    def has_bare_name(self) -> bool:
        """Whether `source` has neither folder nor ending: a task's name, or where there is a `path`, just a name."""
        return "/" not in self.source and "." not in self.source and not self.source.startswith("hub:")


def _share_or_rows(value: float) -> float:
    if value > 1 and value % 1:
        raise ValueError(f"{value:g} is neither a share below 1 nor a whole number of rows; write one of them")
    return value


Held = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_share_or_rows)]


class HeldOut(Frozen):
    """Rows of one's own for the held-out loss.

    files: entries as in the mixture, or just their names; all of their rows but those that are trained on, too.
    share: what is held out of each source of the mixture beside them, as `validation` says it where it is a number."""

    files: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    share: Held = 0.0

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


class AssistantIdentity(Frozen):
    name: str = "Pico"
    maker: str = "the sftflow project"
    skills: tuple[str, ...] | None = None
    """what it says that it can do; None: what the mixture's built-in tasks teach (`tasks.identity`)"""


class Schedule(Frozen):
    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    warmdown: Annotated[float, Field(ge=0, le=1)] = 0.5
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class LrScale(Frozen):
    """Learning rates of the parameter groups, as multiples of the recipe's."""

    matrices: Annotated[float, Field(ge=0)] = 1.0
    embeddings: Annotated[float, Field(ge=0)] = 1.0
    rest: Annotated[float, Field(ge=0)] = 1.0


class Lora(Frozen):
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


class OfBase(Frozen):
    """A learning rate as a multiple of the one that the base was trained with."""

    of_base: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Train(Frozen):
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


class Eval(Frozen):
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


class Compare(Frozen):
    prompts: str = "default"
    judge: str | None = None
    judge_model: str | None = None
