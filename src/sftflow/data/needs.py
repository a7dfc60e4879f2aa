"""What a recipe needs, what of it is there, and how to get the rest: `sftflow data RECIPE`. No row is read."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sftflow.chat.files.sets import parse_set
from sftflow.data.sources import check_source, labels_of
from sftflow.recipe import REPLAY, Recipe, SourceEntry, own_task
from sftflow.tasks import GENERATED, TASKS, TaskSource, make_task
from sftflow.tasks.published import ADDRESSES, LICENCES, PUBLISHED

COUNTED_BYTES = 64 << 20
"""of larger files of lines the rows are not counted"""
MADE = "made by the package"


@dataclass(frozen=True, kw_only=True)
class Need:
    """One thing that a recipe names.

    what: its part of the recipe.   where: a path, `hub:` and an id, or that it comes with the package.   bytes, rows:
    of what is there, None where that is not known at once.   get: a command, or where it is to be had, where it is not
    there.   licence: of a public set, as its publisher states it.
    """

    what: str
    name: str
    where: str
    there: bool = True
    bytes: int | None = None
    rows: int | None = None
    get: str | None = None
    licence: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def needs_of(recipe: Recipe) -> list[Need]:
    """All that a run of the recipe reads. Raises RecipeError or TaskError for a task that there is not."""
    needs = [_model(recipe.base)]
    if recipe.format.endswith(".jinja"):
        needs.append(_path("format", Path(recipe.format).stem, recipe.format, "give the path of a template"))
    names, n = labels_of(recipe.sources), len(recipe.mixture)
    for number, entry in enumerate(recipe.sources):
        place = ("mixture", number) if number < n else ("validation", "files", number - n)
        check_source(entry, recipe.origin.place(*place, "source"))
        needs.append(_of_entry(str(place[0]), entry, names[number]))
    for task in recipe.eval.tasks if recipe.eval else ():
        name, _, path = (part.strip() for part in task.partition("="))
        needs.append(_task("evaluation", name, name, path or None, "test"))
    if recipe.compare is not None and recipe.compare.prompts != "default":
        needs.append(
            _path("prompts", Path(recipe.compare.prompts).stem, recipe.compare.prompts, "give a file of prompts")
        )
    return needs


def _of_entry(what: str, entry: SourceEntry, label: str) -> Need:
    if entry.path == REPLAY:
        return Need(what=what, name=label, where=MADE)
    if entry.source in TASKS or own_task(entry.source):
        found = _task(what, label, entry.source, entry.path, entry.split)
    else:
        found = _data(what, label, entry.path or entry.source, "give a file of rows")
    if found.there or not entry.published:
        return found
    repository = re.search(r"github(?:usercontent)?\.com/([\w.-]+/[\w.-]+)", entry.published)
    licence = LICENCES.get(repository[1]) if repository else None
    address = re.fullmatch(r"https://\S+", entry.published)
    get = _command(found.where, entry.published) if address else entry.published
    return replace(found, get=get, licence=found.licence or licence)


def _task(what: str, label: str, name: str, path: str | None, split: str) -> Need:
    """The rows of a task.   label: what it is called in the recipe."""
    if own := own_task(name):
        return _path(what, label, own[0], "it is a file of your own")
    if name not in TASKS:
        make_task(name, TaskSource(), what)  # says which there are
    if name in GENERATED:
        return Need(what=what, name=label, where=MADE)
    if path is None:
        make_task(name, TaskSource(), what, f"write {name}=PATH")
    assert path is not None
    found = _data(what, label, path, PUBLISHED.get(name, "give its file"))
    address = ADDRESSES.get((name, split))
    if not found.there and address and Path(path).suffix == Path(address).suffix:
        found = replace(found, get=_command(found.where, address))
    return replace(found, licence=LICENCES.get(name) or found.licence)


def _command(path: str, address: str) -> str:
    return f"curl -fL --create-dirs -o {shlex.quote(path)} {shlex.quote(address)}"


def _data(what: str, name: str, where: str, get: str) -> Need:
    """Rows of a path, or of a data set on the hub."""
    if not where.startswith("hub:"):
        return _path(what, name, where, get)
    if (named := parse_set(where)).is_folder:
        return _path(what, name, named.where, get)
    dataset = named.where
    folders = [
        _hub("datasets", f"{dataset.replace('/', '___')}"),
        *_snapshots(f"datasets--{dataset.replace('/', '--')}"),
    ]
    there = [folder for folder in folders if folder.is_dir()]
    command = None if there else f"hf download --repo-type dataset {dataset}"
    size = _size(there[:1])
    return Need(
        what=what, name=name, where=where, there=bool(there), bytes=size, get=command, licence=LICENCES.get(dataset)
    )


def _model(base: str) -> Need:
    """The base: what exists here is a path, else it is a name of the hub."""
    if base.startswith("builtin:"):
        return Need(what="base", name=base, where=MADE)
    if os.path.exists(base) or base.startswith((".", "/", "~")) or base.endswith((".gguf", ".pt")):
        return _path("base", Path(base).name, base, "give a checkpoint's directory, or the name of a model on the hub")
    name, _, revision = base.partition("@")
    there = [folder for folder in _snapshots(f"models--{name.replace('/', '--')}") if any(folder.iterdir())]
    command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
    get = None if there else command
    return Need(what="base", name=base, where=f"hub:{base}", there=bool(there), bytes=_size(there[:1]), get=get)


def _path(what: str, name: str, where: str, get: str) -> Need:
    """A file, a folder, or what a pattern fits."""
    found = [Path(where)] if os.path.exists(where) else sorted(map(Path, glob.glob(where, recursive=True)))
    need = Need(what=what, name=name, where=_short(where), there=bool(found))
    if not found:
        return replace(need, get=get)
    rows = [_rows(path) for path in found]
    whole = sum(n for n in rows if n is not None) if None not in rows and what not in ("base", "format") else None
    return replace(need, bytes=_size(found), rows=whole)


def _rows(path: Path) -> int | None:
    """How many rows a file has, where that is told by its footer, or by counting lines that are not too many."""
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (OSError, ValueError):
            return None  # damaged: reading the rows will say so
    if path.suffix == ".jsonl" and path.is_file() and path.stat().st_size <= COUNTED_BYTES:
        return sum(1 for line in path.open("rb") if line.strip())
    return None


def _size(paths: list[Path]) -> int | None:
    inside: Iterator[Path] = (p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]))
    return sum(path.stat().st_size for path in inside if path.is_file()) if paths else None


def _hub(kind: str, name: str) -> Path:
    """A folder of the hub's libraries, where they keep what they have fetched."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    named = {"datasets": "HF_DATASETS_CACHE", "hub": "HF_HUB_CACHE"}[kind]
    return Path(os.environ.get(named) or home / kind) / name


def _snapshots(name: str) -> list[Path]:
    return sorted(_hub("hub", name).glob("snapshots/*"))


def _short(path: str) -> str:
    """A path as seen from the current folder, where it is below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
