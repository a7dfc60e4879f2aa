"""Which files a name means: one, those of a pattern, those below a folder, those of a data set. And where a row of them
stands."""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sftflow.chat.files import sets
from sftflow.chat.files.packed import PACKED_ENDINGS
from sftflow.chat.files.sets import DataFile
from sftflow.chat.files.table import ENDINGS
from sftflow.foundation.cache import say_once
from sftflow.foundation.errors import DataError

DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", *ENDINGS)
"""what is read of a folder, also packed"""
TEXT_ENDINGS = (".txt", ".text", ".md")
"""each of these is one document of plain text, where the recipe says that it is text; also packed"""
OF_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HELD_APART = re.compile(r"(?:^|[-._ /0-9])(valid|validation|val|dev|test|testing|eval|evaluation)(?=[-._ /0-9])")
"""names of splits that are not for training, as `datasets` finds them in names of files and folders"""


@dataclass
class Places:
    """Where the rows of a source stand. Their numbers count on through its files.

    files: (the number before its first row, file), in order.   fixed: rows of one place, whatever files they come from.

    >>> places = Places([(0, "a.jsonl"), (10, "b.jsonl")])
    >>> places[10], places[11]
    ('a.jsonl:10', 'b.jsonl:1')
    """

    files: list[tuple[int, str]] = field(default_factory=list)
    fixed: bool = False

    def begin(self, number: int, file: str) -> None:
        """Rows of another file follow. (Where the number is 0 none came before, or the source is read anew.)"""
        if not self.fixed:
            if not number:
                self.files.clear()
            self.files.append((number, file))

    def __getitem__(self, number: int) -> str:
        first, file = self.files[max(0, bisect_left(self.files, number, key=lambda f: f[0]) - 1)]
        return f"{file}:{number - first}"

    def among(self, numbers: Sequence[int]) -> Places:
        """What is needed to place these numbers, which rise."""
        start = bisect_left(self.files, numbers[0], key=lambda f: f[0]) - 1
        end = bisect_left(self.files, numbers[-1], key=lambda f: f[0])
        return Places(self.files[max(0, start) : end], fixed=True)


def is_pattern(name: str) -> bool:
    """Whether a name means several files: `test/high_*`. A file of that very name is meant itself."""
    return any(sign in name for sign in "*?[") and not name.startswith(sets.HUB) and not os.path.exists(name)


def files_of(name: str, *, plain: bool = False) -> list[DataFile]:
    """The files that a name means, in an order that hangs on their names alone. Raises DataError where there are none,
    and where it hangs on a choice that the name does not make.   plain: files of TEXT_ENDINGS are data, too."""
    if name.startswith(sets.HUB):
        return sets.files_of_set(name)
    if os.path.isdir(name):
        return _files_of_folder(name, (*DATA_ENDINGS, *TEXT_ENDINGS) if plain else DATA_ENDINGS)
    if not is_pattern(name):
        return [DataFile(name)]
    found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
    if not found:
        folders = sorted(glob.glob(name, recursive=True))[:1]
        fact = f"only folders fit the pattern ({folders[0]} ...)" if folders else "no file fits the pattern"
        raise DataError(name, fact, f"name the files in them: {name}/*" if folders else "check the pattern")
    others = [path for path in found if _is_about_data(path)]
    if 0 < len(others) < len(found):
        _say_others(name, others, "")
    return [DataFile(path) for path in found if path not in others or len(others) == len(found)]


def _is_about_data(path: str) -> bool:
    """Whether a file that fits a pattern is one of those that lie beside data."""
    name = os.path.basename(path)
    return name in OF_NO_ROWS or name.lower().endswith(".md") or name.upper() in ("README", "LICENSE")


def _say_others(name: str, others: Sequence[str], folder: str) -> None:
    shown = ", ".join(os.path.relpath(path, folder) if folder else path for path in others[:3])
    say_once(f"{name}: not read, by their names: {shown}{f' and {len(others) - 3:,} more' if others[3:] else ''}")


def _files_of_folder(name: str, endings: tuple[str, ...]) -> list[DataFile]:
    if sets.is_saved(name):
        return sets.saved_files(name)
    if sets.is_set(name):
        return sets.files_of_set(sets.HUB + name)
    found: list[str] = []
    others: list[str] = []
    for path in _below(name):
        is_data = unpacked(path).endswith(endings) and os.path.basename(path) not in OF_NO_ROWS
        is_data = is_data and not (endings != DATA_ENDINGS and _is_about_data(path))
        (found if is_data else others).append(path)
    if not found:
        inside = ", ".join(os.path.relpath(path, name) for path in others[:3])
        fact = f"a folder without data files (in it: {inside})" if others else "an empty folder"
        raise DataError(name, fact, f"what is read of a folder is {', '.join(endings)}, also packed")
    if others:
        _say_others(name, others, name)
    apart = {path: _HELD_APART.search(os.path.relpath(path, name).lower()) for path in found}
    splits = {match[1] for match in apart.values() if match}
    if (splits and not all(apart.values())) or len(splits) > 1:
        told = next(os.path.relpath(path, name) for path, match in apart.items() if match)
        fact = f"by their names its files are of several splits ({told} is not for training)"
        ending = os.path.basename(found[0]).partition(".")[2]
        remedy = f"write hub:{name}:train (or another split), or {name}/**/*.{ending} for all of them"
        raise DataError(name, fact, remedy)
    return [DataFile(path) for path in found]


def unpacked(path: str) -> str:
    """A file's name in small letters, without the endings of what has packed it.

    >>> unpacked("a/Tales.TXT.gz")
    'a/tales.txt'
    """
    path = path.lower()
    for ending in PACKED_ENDINGS:
        path = path.removesuffix(ending)
    return path


def _below(folder: str) -> list[str]:
    """The files below a folder, sorted, but for hidden ones; through links to folders, though never in a circle."""
    found, seen = [], {os.path.realpath(folder)}
    for at, inner, files in os.walk(folder, followlinks=True):
        new = {name: os.path.realpath(os.path.join(at, name)) for name in inner if name[0] != "."}
        inner[:] = [name for name, real in sorted(new.items()) if real not in seen]
        seen.update(new.values())
        found += [os.path.join(at, name) for name in files if name[0] != "."]
    return sorted(found)


def stem_of(name: str, config: str | None = None) -> str:
    """What rows of a name are called: its file without the ending, the folder of a pattern, the set and what is named
    of it but its revision.

    >>> [stem_of(n) for n in ("a/rows.jsonl", "a/b/*.jsonl.gz", "a/b/", "hub:o/n@main:test")], stem_of("hub:o/n", "c")
    (['rows', 'b', 'b', 'n:test'], 'n:c')
    """
    if name.startswith(sets.HUB):
        name = re.sub(r"@[^:]*", "", name)
    elif is_pattern(name):
        while any(sign in name for sign in "*?["):
            name = os.path.dirname(name)
    return (Path(name).stem or "rows") + (f":{config}" if config else "")
