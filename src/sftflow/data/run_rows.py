"""The rows of a run, kept in its directory when training starts: a comparison then needs neither the recipe's files nor
a second rendering, and outlives both.

held_out.jsonl      a line a held-out row: its conversation as a data file has it, where it came from, ids and mask
training_rows.npz   all rows of the mixture but those left out, each once, held-out ones marked: digest, line, ids, mask
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.files.names import Places
from sftflow.chat.plain_text import Document
from sftflow.chat.schema import Conversation, conversation_of, parse_row
from sftflow.data.mixture import Mixture
from sftflow.data.sources import rows_of_entry
from sftflow.data.store import ROW, Rows
from sftflow.data.truncate import fit_to_length
from sftflow.foundation.atomic_io import write_file
from sftflow.foundation.errors import DataError
from sftflow.recipe import Recipe

HELD_OUT, TRAINING_ROWS = "held_out.jsonl", "training_rows.npz"
MAX_TOKENS = 64_000_000
"""of larger mixtures only the digests are kept: ids and masks would take more than some 100 MB of disk"""


@dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """One example that was not trained on. Of a long conversation it is the beginning of whole turns
    that fitted `train.max_length`; cut after so many tokens, the conversation is whole, and ids and mask are cut. Of a
    long text it is a piece.

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
    numbers = [np.cumsum(~choice.left_out) - 1 for choice in mixture.choices]  # without the rows that are left out
    lines = (_held_out_line(mixture, at, int(numbers[at[0]][at[1]]), conversations[at]) for at in index)
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
    train = recipe.train
    found: dict[tuple[int, int], Conversation] = {}
    for number, (entry, rows) in enumerate(zip(recipe.sources, mixture.rows, strict=True)):
        wanted: dict[int, list[int]] = {}
        for source, row in mixture.held_out.chosen.tolist():
            if source == number:
                wanted.setdefault(int(rows.table["number"][row]), []).append(row)
        last, places = max(wanted, default=0), Places()
        for at, payload in rows_of_entry(entry, recipe, places=places) if wanted else ():
            if at in wanted:
                place = places[at]
                conversation = mixture.renderer.declared(conversation_of(payload, place))
                fitted = fit_to_length(conversation, mixture.renderer, train.max_length, train.overlong)
                for row in wanted[at]:
                    same = [c for c, r in fitted.pairs if np.array_equal(r.ids[: train.max_length], rows.ids(row))]
                    if not same:
                        raise DataError(place, "it has changed since it was rendered", "start again")
                    found[number, row] = same[0]
            if at == last:
                break
    return found


def _held_out_line(mixture: Mixture, at: tuple[int, int], number: int, conversation: Conversation) -> bytes:
    """number: of the row among those of its source that are kept."""
    source, row = at
    rows = mixture.rows[source]
    weights = rows.weights(row)
    line = {
        **_said(conversation, rows.ids(row)),
        "source": mixture.names[source],
        "place": rows.place(row),
        "index": (source, number),
        "ids": rows.ids(row).tolist(),
        "mask": rows.mask(row).tolist(),
        **({} if weights is None else {"weights": weights.tolist()}),
    }
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _said(conversation: Conversation, ids: NDArray[np.int32]) -> dict[str, Any]:
    """What the row is made of.   ids: its own."""
    if document := conversation.document:
        return {**conversation.to_row(), "text_is": "whole" if document.ids is None else "piece"}
    return conversation.to_row() if conversation.messages else {"input_ids": ids.tolist()}


def _arrays(mixture: Mixture) -> dict[str, Any]:
    """What training_rows.npz holds: names, prefixes, and for source N "N/table", "N/held_out", "N/ids", "N/mask",
    and "N/files", where its rows stand."""
    arrays: dict[str, Any] = {"names": mixture.names, "prefixes": [rows.prefix for rows in mixture.rows]}
    used = mixture.rows_in_use()
    whole = sum(int(rows.lengths.sum(dtype=np.int64)) for rows in used) <= MAX_TOKENS
    for number, (rows, choice) in enumerate(zip(used, mixture.choices, strict=True)):
        held_out = np.zeros(len(choice.left_out), bool)
        held_out[choice.held_out] = True
        table = rows.table.copy()
        table["start"] = np.cumsum(table["length"], dtype=np.int64) - table["length"]
        arrays |= {f"{number}/table": table, f"{number}/held_out": held_out[~choice.left_out]}
        arrays[f"{number}/files"] = json.dumps(rows.places.files)
        if whole:
            kept = np.repeat(~choice.left_out, mixture.rows[number].lengths)  # tokens, which lie one after another
            ids = rows.all_ids[kept]
            smallest = np.min_scalar_type(int(ids.max(initial=0)))
            arrays[f"{number}/ids"] = ids.astype(smallest)
            arrays[f"{number}/mask"] = np.packbits(rows.all_masks[kept].astype(bool))
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
    first, row = data["index"]
    return HeldOutRow(
        source=data["source"],
        index=(first, row),
        conversation=_conversation_of(data),
        ids=np.array(data["ids"], np.int64),
        mask=np.array(data["mask"], np.int8),
    )


def _conversation_of(line: dict[str, Any]) -> Conversation:
    if "text_is" not in line:
        return parse_row(_row_of(line), line["place"])
    ids = tuple(line["ids"]) if line["text_is"] == "piece" else None
    document = Document(line["text"], line.get("ends", True), declared=True, ids=ids)
    return Conversation((), source=line["place"], weight=line.get("weight", 1), document=document)


def _row_of(line: dict[str, Any]) -> dict[str, Any]:
    """The conversation of a held-out line; the mask beside it is that of a row of tokens only."""
    of_tokens = ("input_ids", "mask", "weights")
    keys = of_tokens if "input_ids" in line else ("messages", "prompt", "completion", "tools", "weight")
    return {key: line[key] for key in keys if key in line}


def read_training_rows(run: Path) -> TrainingRows:
    """The rows that a run directory was trained on, held-out ones marked. Raises DataError where an older version wrote
    the run."""
    sources, held_out = [], []
    with np.load(_file_of(run, TRAINING_ROWS)) as file:
        whole = "0/ids" in file
        for number, (name, prefix) in enumerate(zip(file["names"].tolist(), file["prefixes"].tolist(), strict=True)):
            table = _as_now(file[f"{number}/table"])
            ids, mask = np.zeros(0, np.int32), np.zeros(0, np.int8)
            if whole:
                ids = file[f"{number}/ids"]
                mask = np.unpackbits(file[f"{number}/mask"], count=len(ids)).view(np.int8)
            files = json.loads(str(file[f"{number}/files"])) if f"{number}/files" in file else ()
            sources.append(Rows(table, ids, mask, name=name, number=number, prefix=prefix, files=files))
            held_out.append(file[f"{number}/held_out"])
    why = None if whole else f"more than the {MAX_TOKENS:,} tokens that are kept beside a run"
    return TrainingRows(sources=sources, held_out=held_out, without_ids=why)


def _as_now(table: NDArray[Any]) -> NDArray[Any]:
    """A table of rows with the columns that an older version did not write."""
    if table.dtype == ROW:
        return table
    found = np.zeros(len(table), ROW)
    for name in table.dtype.names or ():
        found[name] = table[name]
    return found


def _file_of(run: Path, name: str) -> Path:
    file = run / name
    if not file.is_file():
        raise DataError(str(file), "missing: deleted, or of a run of an older version", "put it back, or train again")
    return file
