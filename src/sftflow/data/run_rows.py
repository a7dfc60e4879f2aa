"""The rows of a run, kept in its directory when training starts: a comparison then needs neither the recipe's files nor
a second rendering, and outlives both.

held_out.jsonl      a line a held-out row: its conversation as a data file has it, where it came from, ids and mask
training_rows.npz   all rows of the mixture, each once, held-out ones marked: digest, line, ids, mask
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftflow.atomic_io import write_file
from sftflow.chat.schema import Conversation, conversation_of, parse_row
from sftflow.data.mixture import Mixture
from sftflow.data.sources import place_of, rows_of_entry
from sftflow.data.store import ROW, Rows
from sftflow.data.truncate import fit_to_length
from sftflow.errors import DataError
from sftflow.recipe import Recipe

HELD_OUT, TRAINING_ROWS = "held_out.jsonl", "training_rows.npz"
MAX_TOKENS = 64_000_000
"""of larger mixtures only the digests are kept: ids and masks would take more than some 100 MB of disk"""


@dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """One example that was not trained on. A long conversation is the beginning that fitted `train.max_length`.

    source: name of its mixture entry.   index: (number of that entry, row), as `TrainingRows` counts them.
    ids: (n,) as rendered for the run.   mask: (n,) 1 where supervised.
    """

    source: str
    index: tuple[int, int]
    conversation: Conversation
    ids: NDArray[np.int64]
    mask: NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """sources: the rows of each mixture entry in its order, without repeats.   held_out: (rows,) for each of them,
    which were not trained on.   without_ids: why the rows have digests, places and lengths only; None where they are
    whole."""

    sources: list[Rows]
    held_out: list[NDArray[np.bool_]]
    without_ids: str | None = None


# ---- writing


def write_run_rows(out: Path, mixture: Mixture, recipe: Recipe) -> None:
    """Write both files into the run directory. Raises DataError where a source has changed since it was rendered."""
    index = drawn_in_turn(mixture.held_out.chosen, recipe.train.seed)
    conversations = held_out_conversations(mixture, recipe)
    lines = (_held_out_line(mixture, at, conversations[at]) for at in index)
    write_file(out / HELD_OUT, lambda file: file.writelines(lines))
    write_file(out / TRAINING_ROWS, lambda file: np.savez_compressed(file, **_arrays(mixture)))


def drawn_in_turn(chosen: NDArray[np.int32], seed: int) -> list[tuple[int, int]]:
    """The (source, row) pairs in an order whose first n are a sample: one of each source, in turn, at random.

    >>> drawn_in_turn(np.array([[0, 4], [0, 5], [0, 6], [1, 9]], np.int32), seed=0)
    [(0, 5), (1, 9), (0, 4), (0, 6)]
    """
    queues: dict[int, list[int]] = {}
    for source, row in chosen.tolist():
        queues.setdefault(source, []).append(row)
    for source, queue in queues.items():
        random.Random(f"{source}:{seed}").shuffle(queue)
    in_turn = sorted((turn, source) for source, queue in queues.items() for turn in range(len(queue)))
    return [(source, queues[source][turn]) for turn, source in in_turn]


def held_out_conversations(mixture: Mixture, recipe: Recipe) -> dict[tuple[int, int], Conversation]:
    """What each held-out row was rendered from, by (source, row): their lines are read once more."""
    found: dict[tuple[int, int], Conversation] = {}
    for number, (entry, rows) in enumerate(zip(recipe.mixture, mixture.rows, strict=True)):
        wanted: dict[int, list[int]] = {}
        for source, row in mixture.held_out.chosen.tolist():
            if source == number:
                wanted.setdefault(int(rows.table["number"][row]), []).append(row)
        last = max(wanted, default=0)
        for at, payload in rows_of_entry(entry, recipe) if wanted else ():
            if at in wanted:
                place = f"{place_of(entry)}:{at}"
                conversation = conversation_of(payload, place)
                pairs = fit_to_length(
                    conversation, mixture.renderer, recipe.train.max_length, recipe.train.overlong
                ).pairs
                for row in wanted[at]:
                    same = [c for c, r in pairs if np.array_equal(r.ids, rows.ids(row))]
                    if not same:
                        raise DataError(place, "it has changed since it was rendered", "start again")
                    found[number, row] = same[0]
            if at == last:
                break
    return found


def _held_out_line(mixture: Mixture, at: tuple[int, int], conversation: Conversation) -> bytes:
    source, row = at
    rows = mixture.rows[source]
    line = {
        **conversation.to_row(),
        "source": mixture.names[source],
        "place": rows.place(row),
        "index": at,
        "ids": rows.ids(row).tolist(),
        "mask": rows.mask(row).tolist(),
    }
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _arrays(mixture: Mixture) -> dict[str, NDArray[np.generic]]:
    """What training_rows.npz holds, sources one after another: {"ids": (tokens,), "length": (rows,), ...}"""
    table = np.concatenate([rows.table for rows in mixture.rows])
    held_out = [np.zeros(len(rows), bool) for rows in mixture.rows]
    for source, row in mixture.held_out.chosen:
        held_out[source][row] = True
    arrays: dict[str, NDArray[np.generic]] = {
        "names": np.array(mixture.names),
        "prefixes": np.array([rows.prefix for rows in mixture.rows]),
        "rows": np.array([len(rows) for rows in mixture.rows]),
        "held_out": np.concatenate(held_out),
        **{name: table[name] for name in ("number", "length", "supervised", "digest")},
    }
    if table["length"].sum(dtype=np.int64) <= MAX_TOKENS:
        ids = np.concatenate([rows.all_ids for rows in mixture.rows])
        arrays["ids"] = ids.astype(np.min_scalar_type(int(ids.max(initial=0))))
        arrays["mask"] = np.packbits(np.concatenate([rows.all_masks for rows in mixture.rows]).astype(bool))
    return arrays


# ---- reading


def read_held_out(run: Path, limit: int | None = None) -> list[HeldOutRow]:
    """The held-out rows of a run directory, in the mixture's order; `limit` of them at most, drawn in turn from each
    source. Raises DataError where an older version wrote the run."""
    file = _file_of(run, HELD_OUT)
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return sorted((_held_out_row(line) for line in lines[:limit]), key=lambda row: row.index)


def _held_out_row(line: str) -> HeldOutRow:
    data = json.loads(line)
    conversation = parse_row({key: data[key] for key in ("messages", "tools") if key in data}, data["place"])
    return HeldOutRow(
        source=data["source"],
        index=(data["index"][0], data["index"][1]),
        conversation=conversation,
        ids=np.array(data["ids"], np.int64),
        mask=np.array(data["mask"], np.int8),
    )


def read_training_rows(run: Path) -> TrainingRows:
    """The rows that a run directory was trained on, held-out ones marked. Raises DataError where an older version wrote
    the run."""
    with np.load(_file_of(run, TRAINING_ROWS)) as file:
        arrays = {name: file[name] for name in file.files}
    table = np.zeros(len(arrays["length"]), ROW)
    for name in ("number", "length", "supervised", "digest"):
        table[name] = arrays[name]
    ends = np.cumsum(arrays["length"], dtype=np.int64)
    table["start"] = ends - arrays["length"]
    n_tokens = int(ends[-1])
    whole = "ids" in arrays
    ids = arrays["ids"] if whole else np.zeros(0, np.int32)
    mask = np.unpackbits(arrays["mask"], count=n_tokens).view(np.int8) if whole else np.zeros(0, np.int8)
    sources, held_out = [], []
    for number, (begin, end) in enumerate(_spans(arrays["rows"])):
        name, prefix = str(arrays["names"][number]), str(arrays["prefixes"][number])
        sources.append(Rows(table[begin:end], ids, mask, name=name, number=number, prefix=prefix))
        held_out.append(arrays["held_out"][begin:end])
    why = f"{n_tokens:,} tokens are more than the {MAX_TOKENS:,} that are kept beside a run"
    return TrainingRows(sources=sources, held_out=held_out, without_ids=None if whole else why)


def _spans(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(sizes)
    yield from zip((ends - sizes).tolist(), ends.tolist(), strict=True)


def _file_of(run: Path, name: str) -> Path:
    file = run / name
    if not file.is_file():
        raise DataError(str(file), "this file is missing: an older version trained this run", "train it again")
    return file
