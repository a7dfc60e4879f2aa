"""Graded rows on disk as they finish, so that a run that dies goes on from them.

eval/MODEL-TASK.jsonl         a row an item, appended as it finishes; in the items' order when all are there
eval/MODEL-TASK.meta.json     what decided them: weights, format, decoding, code, versions ... (their provenance)
eval/kept/MODEL-TASK.jsonl    finished rows that were not asked for this time: of more items, or of other weights
eval/ranks/N/MODEL-TASK.jsonl of several processes: what rank N has finished, until rank 0 has it in the task's file

Each row holds the hash of its provenance, and is taken over where that is the same. No finished row is thrown away.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from sftflow.fingerprint import hash_json, items_hash, prompt_hash
from sftflow.foundation.atomic_io import NO_SPACE, finite, reason, write_json, write_text
from sftflow.foundation.errors import RunError
from sftflow.foundation.ranks import ranks
from sftflow.tasks import Item

KEPT, RANKS = "kept", "ranks"
LONGEST_NAME = 100
IN_FILE = {"provenance": "rests_on", "details": "marks"}
"""fields of a row that have another name in files"""

Key = tuple[str, str, str, int]


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One graded reply.

    question: the last message.   earlier: those in front of it, each with its `role` and `content`.
    prompt_sha256: of the prompt's ids.   item_sha256: of all that is asked and graded.   provenance: hash of what else
    decides the row (meta.json); `rests_on` in the file.   ids: the generated ids.   near_ties: places where the two
    likeliest tokens were within 1e-4.   details: what the grader found beside the score; `marks` in the file.
    sample: which of the replies to the item it is, from 0.
    finish_reason: "too_long" where the prompt does not fit the model's context; that scores 0.
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
    provenance: str = ""
    near_ties: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    earlier: tuple[dict[str, str], ...] = ()
    sample: int = 0

    @property
    def text(self) -> str:
        """The reply, as `generation.Reply` names it."""
        return self.reply

    @property
    def key(self) -> Key:
        return self.id, self.prompt_sha256, self.item_sha256, self.sample

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        return {IN_FILE.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EvalRow:
        """A row of a file; keys of other versions are left out. Raises KeyError or TypeError where one is missing."""
        known = {f.name: IN_FILE.get(f.name, f.name) for f in fields(cls)}
        given = {name: row[key] for name, key in known.items() if key in row}
        return cls(**given | {"ids": tuple(row["ids"]), "earlier": tuple(row.get("earlier", ()))})


def key_of(item: Item, prompt: Iterable[int], sample: int = 0) -> Key:
    """The key of the row that the item's reply to this prompt will have."""
    return item.id, prompt_hash(prompt), items_hash([item]), sample


def safe_name(model: str) -> str:
    """A model's name as a part of a file's. One that must be changed gets a hash, so that no two models share a file.

    >>> safe_name("mine"), safe_name("runs/mine"), safe_name("runs-mine")
    ('mine', 'runs-mine-8e76d4', 'runs-mine')
    """
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model).strip("-.")[-LONGEST_NAME:]
    return name if name == model else f"{name or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


class Journal(AbstractContextManager["Journal"]):
    """One task's rows for one model and arm. Thread-safe: rows finish in any order. All ranks open and close it.

    rows: the finished ones of this provenance by their keys; there may be more of them than are asked for.
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Takes over the rows of the same provenance that are there; sets the others aside."""
        self.path, self.kept = path, path.parent / KEPT / path.name
        self._stamp = hash_json(dict(provenance))
        self._lock = threading.Lock()
        self._others: list[EvalRow] = []
        self.rows: dict[Key, EvalRow] = {}
        here = ranks()
        if here.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take_over()
            write_json(path.with_suffix(".meta.json"), dict(provenance))
        self.rows = here.from_first(self.rows)
        own = path if here.first else path.parent / RANKS / str(here.rank) / path.name
        own.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = own.open("ab", buffering=0)

    def _take_over(self) -> None:
        here, whole = _read_rows(self.path)
        here += [row for part in self._parts() for row in _read_rows(part)[0]]
        found = {(row.provenance, row.key): row for row in [*_read_rows(self.kept)[0], *here]}
        self.rows = {key: row for (stamp, key), row in found.items() if stamp == self._stamp}
        self._others = [row for (stamp, _), row in found.items() if stamp != self._stamp]
        # What is set aside is written before the file is cut, so that each row is in one of the two at any time.
        foreign = any(row.provenance != self._stamp for row in here)
        if foreign:
            self._set_aside(list(found.values()))
        if foreign or not whole or len(here) != len(self.rows) or self._parts():
            write_text(self.path, "".join(map(_line, self.rows.values())))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        """What other ranks, of this run or an earlier one, have left for the first."""
        return sorted((self.path.parent / RANKS).glob(f"*/{glob.escape(self.path.name)}"))

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, row: EvalRow) -> EvalRow:
        """Append a row, stamped with the provenance: whole, or not at all where the disk is full."""
        row = replace(row, provenance=self._stamp)
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
        return row

    def close(self, asked: Sequence[EvalRow] | None = None) -> None:
        """asked: the rows of all items in their order, of all ranks. Other rows are set aside."""
        if not self._file.closed:
            with self._file:
                os.fsync(self._file.fileno())
        if asked is None:
            return
        ranks().barrier()  # none writes any more
        if ranks().first:
            wanted = {row.key for row in asked}
            self._set_aside([*self._others, *(row for key, row in self.rows.items() if key not in wanted)])
            write_text(self.path, "".join(map(_line, asked)))
            for part in self._parts():
                part.unlink()
                for folder in (part.parent, part.parent.parent):
                    with suppress(OSError):  # other tasks' rows are in it
                        folder.rmdir()

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
    return json.dumps(finite(row.to_json()), ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path) -> tuple[list[EvalRow], bool]:
    """The whole rows of a file, and whether it holds nothing else; what a kill cut off is no row."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], True
    rows = []
    for line in lines:
        try:
            rows.append(EvalRow.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows, len(rows) == len(lines) - 1 and not lines[-1]
