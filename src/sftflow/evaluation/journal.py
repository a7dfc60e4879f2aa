"""Graded rows on disk as they finish, so that a run that dies goes on from them.

eval/MODEL-TASK.jsonl         a row an item, appended as it finishes; in the items' order when all are there
eval/MODEL-TASK.meta.json     what the rows rest on
eval/kept/MODEL-TASK.jsonl    finished rows that were not asked for this time: of more items, or of other weights

Each row says by a hash what it rests on, and is taken over where that is the same. No finished row is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from sftflow.atomic_io import NO_SPACE, finite, reason, write_json, write_text
from sftflow.errors import RunError
from sftflow.fingerprint import hash_json, items_hash, prompt_hash
from sftflow.tasks import Item

KEPT = "kept"
LONGEST_NAME = 100

Key = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One graded reply.

    prompt_sha256: of the prompt's ids.   item_sha256: of all that is asked and graded.   rests_on: hash of the rest
    (meta.json).   ids: the generated ids.   near_ties: places where the two likeliest tokens were within 1e-4.
    marks: what the grader says beside the score.   finish_reason: "too_long" where the prompt does not fit the model's
    context; that scores 0.
    """

    id: str
    question: str
    answer: Any
    reply: str
    score: float
    finish_reason: str
    n_prompt: int
    n_generated: int
    seconds: float
    prompt_sha256: str
    item_sha256: str = ""
    rests_on: str = ""
    near_ties: int = 0
    marks: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.id, self.prompt_sha256, self.item_sha256


def key_of(item: Item, prompt: Iterable[int]) -> Key:
    """What its row's `key` will be."""
    return item.id, prompt_hash(prompt), items_hash([item])


def safe_name(model: str) -> str:
    """A model's name as a part of a file's. One that must be changed gets a hash, so that no two models share a file.

    >>> safe_name("mine"), safe_name("runs/mine"), safe_name("runs-mine")
    ('mine', 'runs-mine-8e76d4', 'runs-mine')
    """
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model).strip("-.")[-LONGEST_NAME:]
    return name if name == model else f"{name or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


class Journal:
    """One task's rows for one model and arm. Thread-safe: rows finish in any order.

    rows: the finished ones that rest on the same, by their keys; more of them may be there than are asked for.
    """

    def __init__(self, path: Path, rests_on: Mapping[str, Any]) -> None:
        """Takes over the rows that are there where they rest on the same; sets the others aside."""
        self.path, self.kept = path, path.parent / KEPT / path.name
        self._stamp = hash_json(dict(rests_on))
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        here, whole = _read_rows(path)
        found = {(row.rests_on, row.key): row for row in [*_read_rows(self.kept)[0], *here]}
        self.rows = {key: row for (stamp, key), row in found.items() if stamp == self._stamp}
        self._others = [row for (stamp, _), row in found.items() if stamp != self._stamp]
        self.taken_over = len(self.rows)
        # What is set aside is written before the file is cut, so that each row is in one of the two at any time.
        foreign = any(row.rests_on != self._stamp for row in here)
        if foreign:
            self._set_aside(list(found.values()))
        if foreign or not whole or len(here) != len(self.rows):
            write_text(path, "".join(map(_line, self.rows.values())))
        write_json(path.with_suffix(".meta.json"), dict(rests_on))
        self._file: IO[bytes] = path.open("ab", buffering=0)

    def add(self, row: EvalRow) -> None:
        """Append a row: whole, or not at all where the disk is full."""
        row = replace(row, rests_on=self._stamp)
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            rest = memoryview(_line(row).encode())
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                os.ftruncate(self._file.fileno(), end)
                raise
            self.rows[row.key] = row

    def close(self, asked: Sequence[Key] | None = None) -> None:
        """asked: the keys of all items in their order, once their rows are there. Other rows are set aside."""
        with self._file:
            os.fsync(self._file.fileno())
        if asked is not None:
            wanted = set(asked)
            self._set_aside([*self._others, *(row for key, row in self.rows.items() if key not in wanted)])
            write_text(self.path, "".join(_line(self.rows[key]) for key in asked))

    def _set_aside(self, rows: Sequence[EvalRow]) -> None:
        if rows:
            write_text(self.kept, "".join(map(_line, rows)))
        else:
            self.kept.unlink(missing_ok=True)


@contextmanager
def telling_full_disk(out: Path) -> Iterator[None]:
    """A full disk as a RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        fact = f"cannot write ({reason(error)})"
        raise RunError(str(out), fact, "free space; a rerun goes on from the finished rows") from error


def _line(row: EvalRow) -> str:
    return json.dumps(finite(asdict(row)), ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path) -> tuple[list[EvalRow], bool]:
    """The whole rows of a file, and whether it holds nothing else; what a kill cut off is no row."""
    known = {f.name for f in fields(EvalRow)}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], True
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(EvalRow(**{k: v for k, v in row.items() if k in known} | {"ids": tuple(row["ids"])}))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows, len(rows) == len(lines) - 1 and not lines[-1]
