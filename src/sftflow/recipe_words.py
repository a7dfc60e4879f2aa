"""What is wrong with a recipe, in words: where the value was written, and what to write instead."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sftflow.foundation.errors import RecipeError, SftflowError
from sftflow.other_trainers import normal, ours

Path = tuple[str | int, ...]
PAGE = "docs/from_other_trainers.md"
NEAR = {
    "bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "half": "bf16", "float32": "fp32", "float": "fp32",
    "full": "fp32", "truncate": "cut", "truncation": "cut", "skip": "drop", "warn": "skip", "ignore": "skip",
    "error": "stop", "raise": "stop", "loss": "validation_loss", "eval_loss": "validation_loss", "final": "last",
    "torch.bfloat16": "bf16", "torch.float32": "fp32", "constant_with_warmup": "constant",
}  # fmt: skip
"""values of other trainers, and which of ours comes near where it is among those that may be written"""
OPTIONS = {
    "--allow-code": "eval.allow_code: true", "--format": "format", "--judge-model": "compare.judge_model",
    "--judge": "compare.judge", "--limit": "eval.limit", "--prompts": "compare.prompts", "--tasks": "eval.tasks",
    "--thinking on": "eval.thinking: true", "--thinking": "eval.thinking", "--shots": "eval.shots",
    "--samples": "eval.samples", "--temperature": "eval.temperature", "--max-tokens": "eval.max_tokens",
}  # fmt: skip
"""options of commands, and the keys of a recipe by which the same is asked for"""
_OPTION = re.compile("|".join(OPTIONS))
_ENTRY = "sf.task(NAME, {0}=...) or {{'source': FILE, '{0}': ...}}"


@dataclass(frozen=True)
class Origin:
    """Where the values of a recipe were written. (Two recipes are equal wherever they were.)

    file: what the recipe is called.   text: its YAML, by which lines are told.   sets: (key, as it was said) of each
    `--set`.   arguments: of a function of Python, those of `train` by their own names.
    """

    file: str = field(default="recipe", compare=False)
    text: str = field(default="", compare=False)
    sets: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    arguments: frozenset[str] = field(default=frozenset(), compare=False)

    def place(self, *path: str | int) -> str:
        """What an error calls the place of a value.

        >>> Origin("r.yaml", "train:\\n  lrr: 1\\n").place("train", "lrr")
        'r.yaml:2: train.lrr'
        >>> Origin("r.yaml", sets=(("train.steps", "--set train.steps=x"),)).place("train", "steps")
        '--set train.steps=x: train.steps'
        >>> Origin(arguments=frozenset(["steps"])).place("train", "steps")
        'steps'
        """
        dotted = ".".join(map(str, path))
        if said := self._said(dotted):
            return f"{said}: {dotted}"
        if given := self.argument(path):
            return given
        line = _line(self.text, path) if self.text else None
        return f"{self.file}:{line}: {dotted}" if line else f"{self.file}: {dotted}"

    def write(self, key: str, path: Path) -> str:
        """How a key is written where `path` was."""
        inside = path[0] == "mixture" and len(path) > 2
        if self._said(".".join(map(str, path))):
            return f"write --set {key.replace('mixture.', f'mixture.{path[1] if inside else 0}.')}=..."
        if self.argument(path) and (inside or not key.startswith("mixture.")):
            first, *inner = key.removeprefix("train.").removeprefix("mixture.").split(".")
            return f"write {first}={{{inner[0]!r}: ...}}" if inner else f"write {first}=..."
        if key.startswith("mixture."):
            leaf = key.removeprefix("mixture.")
            shown = f": {_ENTRY.format(leaf)}" if self.argument(path) else ""
            return f"write {leaf} in an entry of the mixture{shown}"
        return f"write {key}" if "." in key else f"write {key}, at the top of the recipe"

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Around what a recipe asks for: errors name its keys where they would name options of a command."""
        try:
            yield
        except SftflowError as error:
            if found := _OPTION.match(error.place):
                place = self.place(*OPTIONS[found[0]].partition(":")[0].split("."))
                error.place = place + error.place[found.end() :]
            error.reword(lambda text: _OPTION.sub(lambda option: OPTIONS[option[0]], text))
            raise

    def argument(self, path: Path) -> str:
        """What a value is called that came as an argument; "" for another."""
        if (dotted := ".".join(map(str, path))) in self.arguments:
            return dotted
        for inner in (0, 1 if path[:1] == ("train",) else 2):
            if len(path) > inner and path[inner] in self.arguments:
                return ".".join(map(str, path[inner:]))
        return ""

    def _said(self, dotted: str) -> str:
        """The `--set` that a value came with; "" for another."""
        return next((said for key, said in self.sets[::-1] if f"{dotted}.".startswith(f"{key}.")), "")


def _line(text: str, path: Path) -> int | None:
    """The line, from 1, of what stands at a place of a YAML text, or of what holds it."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == step]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            found = [(v, v) for v in node.value[step : step + 1]]
        else:
            found = []
        if not found:
            break
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def told(error: ValidationError, model: type[BaseModel], origin: Origin) -> RecipeError:
    """The mistake that is said first: an unknown key (it may stand for one that is missing), else the first."""
    mistakes = error.errors()
    unknown = [_of_keys(m["loc"]) for m in mistakes if m["type"] in ("extra_forbidden", "invalid_key")]
    if unknown:
        remedy = _unknown(unknown[0], model, origin)
        theirs = [path for path in unknown if ours(str(path[-1]))]
        if len(theirs) > 2:
            remedy += f". {len(unknown)} keys are unknown here: {PAGE} has those of other trainers"
        return RecipeError(origin.place(*unknown[0]), "unknown key", remedy)
    first = mistakes[0]
    path = _of_keys((*first["loc"], ""))[:-1]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return RecipeError(origin.place(*path), "this key is missing", _MISSING.get(str(path[-1]), "add it"))
    if first["type"] == "too_short":
        return RecipeError(origin.place(*path), "it is empty", _MISSING.get(str(path[-1]), "add to it"))
    if first["type"] == "value_error":  # one of our own: "fact; remedy"
        fact, _, remedy = (part if len(part) < 400 else f"{part[:397]}..." for part in message.partition("; "))
        return RecipeError(origin.place(*path), fact, remedy)
    if not path:  # a key that is no text
        return RecipeError(origin.file, f"a key in it cannot be read ({message})", "write it as plain text")
    value = first.get("input")
    holder = model_at(model, path[:-1])
    allowed: list[str] = []
    if str(path[-1]).startswith("literal["):  # one of several kinds of value, of which each has its own error
        path, holder = path[:-1], model_at(model, path[:-2])
        message = str(holder.model_fields[str(path[-1])].description)
    elif first["type"] == "literal_error":
        kinds = holder.model_fields[str(path[-1])].annotation
        found = [v for kind in (kinds, *get_args(kinds)) for v in get_args(kind) or (kind,) if isinstance(v, str)]
        allowed = list(dict.fromkeys(found))
        message = " or ".join(map(repr, allowed))
    else:
        message = _KINDS.get(first["type"], message.replace("Input should be ", ""))
    shown = json.dumps(value, default=str, ensure_ascii=False)
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."
    fact = f"it should be {message} (given: {shown})"
    return RecipeError(origin.place(*path), fact, _remedy(value, first["type"], allowed, path, model))


def _of_keys(location: Path) -> Path:
    """Without the name of a model that is one of several kinds of value: that is no key.

    >>> _of_keys(("train", "lr", "OfBase", "of_bas"))
    ('train', 'lr', 'of_bas')
    """
    *above, last = location
    return (*(part for part in above if not str(part)[:1].isupper()), last)


def _remedy(value: Any, kind: str, allowed: list[str], path: Path, model: type[BaseModel]) -> str:
    """What to write in place of a value."""
    info = model_at(model, path[:-1]).model_fields.get(str(path[-1]))
    nullable = info is not None and type(None) in get_args(info.annotation)
    if value is None and info is not None and info.is_required():
        return _MISSING.get(str(path[-1]), "give it a value")
    if value is None:
        return "leave the key out, or give it a value"
    if nullable and (value == -1 or str(value).lower() in ("none", "false", "off", "no")):
        return "write null"
    if kind == "tuple_type":
        entry = f"source: {value}" if path == ("mixture",) and isinstance(value, str) else value
        if isinstance(value, dict) and path[-1] == "tasks":
            return f"write [{', '.join(f'{name}={file}' for name, file in value.items())}]"
        return f"write [{entry}]" if isinstance(entry, str) else "write [...] around it"
    if kind.startswith("less_than"):
        return f"it is a share{_SHARES.get(str(path[-1]), '')}: 0.1 is a tenth"
    if kind.startswith("model_"):
        if len(path) == 2 and path[0] == "mixture" and isinstance(value, str):
            return f"write source: {value}"
        return f"its keys: {', '.join(_open(model_at(model, path)))}"
    return _near(str(value).lower(), allowed) or "correct the value"


_MISSING = {
    "mixture": "write what to train on: mixture: [{source: FILE, or a task}]",
    "source": "write source: a data file, hub:OWNER/NAME or a task",
}
_SHARES = {
    "warmup": " of the steps",
    "warmdown": " of the steps",
    "final": " of train.lr",
    "max_dropped": " of the rows",
    "share": " of the supervised tokens",
}
_KINDS = {
    "model_type": "a mapping of keys", "model_attributes_type": "a mapping of keys", "tuple_type": "a list",
    "int_from_float": "a whole number", "int_parsing": "a whole number", "float_parsing": "a number",
    "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "a text",
    "int_type": "a whole number", "float_type": "a number", "dict_type": "a mapping of names",
}  # fmt: skip
"""kinds of pydantic's errors, and what the value should be, in words"""


def _near(said: str, allowed: list[str]) -> str:
    """The allowed value that was meant, as far as can be told."""
    known = NEAR.get(said)
    if known not in allowed:
        inside = sorted((a for a in allowed if a in said or (len(said) > 2 and said in a)), key=len)
        known = inside[-1] if inside else next(iter(difflib.get_close_matches(said, allowed, 1, 0.75)), None)
    return f"did you mean {known!r}?" if known else ""


def _unknown(path: Path, model: type[BaseModel], origin: Origin) -> str:
    """What to write in place of a key that is unknown where it stands."""
    known = _open(model_at(model, path[:-1]))
    near = difflib.get_close_matches(normal(str(path[-1])), known, 1, 0.75)
    return (near != [normal(str(path[-1]))] and elsewhere(path, model, origin)) or (
        f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    )


def elsewhere(path: Path, model: type[BaseModel], origin: Origin) -> str:
    """What to write in place of a key that stands elsewhere, or is another trainer's; "" for another."""
    name = normal(str(path[-1]))
    theirs = ours(name, in_mixture=path[0] == "mixture")
    holders = [key for key, leaf in _keys(model) if leaf == name and "validation.files." not in key]  # a mixture's, too
    if theirs is not None and theirs.key.startswith(f"{path[0]}."):  # another trainer's word for what stands beside it
        holders = []
    if holders and not (theirs and theirs.key in holders):
        if len(holders) > 1 or holders[0].startswith("mixture."):
            shown = f": {_ENTRY.format(name)}" if origin.argument(path) and holders[0].startswith("mixture.") else ""
            return f"it is a key of {' and of '.join(map(_holder, reversed(holders)))}{shown}"
        return origin.write(holders[0], path)
    if theirs is None:
        return ""
    if theirs.key and theirs.key.split(".") != [str(p) for p in path if isinstance(p, str)]:
        said = origin.write(theirs.key, path)
        return f"{said} ({theirs.note})" if theirs.note else said
    return theirs.note


def _open(model: type[BaseModel]) -> list[str]:
    """The keys that may be written."""
    return [name for name, info in model.model_fields.items() if not info.exclude]


def _holder(key: str) -> str:
    above = key.rpartition(".")[0]
    return "a mixture's entries" if above == "mixture" else above or "the recipe's top"


def _keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, its last part) of all keys of a recipe."""
    for name in _open(model):
        yield above + name, name
        inner = model_at(model, (name,))
        if inner is not model:
            yield from _keys(inner, f"{above}{name}.")


def model_at(model: type[BaseModel], location: Path) -> type[BaseModel]:
    """The model of a place of the recipe: its fields are the keys that are known there."""
    for step in location:
        if isinstance(step, int) or step not in model.model_fields:
            continue
        annotation = model.model_fields[step].annotation
        kinds = (getattr(kind, "__origin__", kind) for kind in (annotation, *get_args(annotation)))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model
