"""A source's rows in parts, each rendered by a process of its own, anywhere: `sftflow mix RECIPE --part I/N`.

A source is cut into blocks of rows, and part I of N takes every Nth block. So the parts are alike where rows grow
longer towards a file's end, and no row need be counted before. What a process has rendered lies in the cache, under the
name of the whole with `.I-of-N` behind it, block for block; whoever asks for the whole reads these blocks in the
source's order, through the same code that takes them from the processes which render (`prepare.py`). So all comes out
as if one process had made it, to the byte: rows, ledger, bad rows, and which one is the first.

ids.bin, mask.bin, rows.npy, weights.npy, meta.json    as in any store (`store.py`)
blocks.jsonl                              of each block: its place in the source, its rows and tokens, its counts
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sftflow.chat.files.names import Places
from sftflow.data.render_pool import Block, Counts
from sftflow.data.store import RowWriter, read_spans
from sftflow.foundation.errors import RecipeError

PROVEN = ".proven"
"""behind the key of a whole store: every row of it was verified"""
NumberedBlock = tuple[int, Block]  # (the block of the source that it is of, what was rendered)


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, 1 <= number <= of."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    def takes(self, block: int, key: str) -> bool:
        """Whether a block of a source is in this part. The source's key decides with which block part 1 begins: small
        sources are not all in the first part.

        >>> [[b for b in range(7) if Part(i, 3).takes(b, "0")] for i in (1, 2, 3)]
        [[1, 4], [2, 5], [0, 3, 6]]
        """
        return (block + int(key, 16)) % self.of == self.number % self.of


def parse_part(text: str) -> Part:
    """ "2/3" -> Part(2, 3). 0/3 is 3/3: indexes that begin with 0, as those of Kubernetes do, name each part once, too.
    Raises RecipeError for what is none."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip(), re.ASCII)
    if found is None or int(found[2]) == 0:
        fact = f"{text!r} is not a part of so many"
        raise RecipeError("--part", fact, "write I/N, as 2/3: the second of three")
    number, of = int(found[1]), int(found[2])
    if number > of:
        fact = f"there is no part {number} of {of}"
        raise RecipeError("--part", fact, f"the parts are 1/{of} to {of}/{of}, or 0/{of} to {of - 1}/{of}")
    return Part(number or of, of)


def name_of(key: str, part: Part) -> str:
    """What a part of the rows under a key is called in the cache."""
    return f"{key}.{part.number}-of-{part.of}"


def missing_parts(parts: Collection[Part]) -> list[Part]:
    """What is not among the parts of one N; [] where there are none."""
    of = next(iter(parts)).of if parts else 0
    return [part for part in (Part(i, of) for i in range(1, of + 1)) if part not in parts]


def told_parts(parts: Sequence[Part], missing: Sequence[Part]) -> str:
    """
    >>> told_parts([Part(1, 3), Part(2, 3)], [Part(3, 3)])
    '2 of 3 parts are joined; the rows of part 3 are rendered here'
    """
    there = f"{len(parts)} of {parts[0].of} parts {'is' if len(parts) == 1 else 'are'} joined"
    if not missing:
        return there
    s = "s" * (len(missing) > 1)
    return f"{there}; the rows of part{s} {told_numbers(missing)} are rendered here"


def told_numbers(parts: Sequence[Part]) -> str:
    """
    >>> told_numbers([Part(i, 20) for i in range(3, 17)])
    '3, 4, 5, 6, 7, 8, 9, 10 and 6 more'
    """
    more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
    return ", ".join(str(part.number) for part in parts[:8]) + more


def is_part(name: str) -> bool:
    """
    >>> is_part("00ab.2-of-3"), is_part("00ab.proven")
    (True, False)
    """
    return "-of-" in name


def stored_parts(folder: Path, key: str) -> dict[Part, Path]:
    """The parts of a key that are there, of the N of which most are."""
    found: dict[int, dict[Part, Path]] = {}
    for path in folder.glob(f"{key}.*-of-*"):
        numbers = re.fullmatch(rf"{key}\.(\d+)-of-(\d+)", path.name)
        if numbers and (path / "meta.json").is_file():
            part = Part(int(numbers[1]), int(numbers[2]))
            found.setdefault(part.of, {})[part] = path
    best = max(found, key=lambda of: (len(found[of]) / of, of), default=0)
    return dict(sorted(found.get(best, {}).items(), key=lambda item: item[0].number))


def write_part(
    directory: Path, blocks: Generator[NumberedBlock, None, None], places: Places, progress: Callable[[int], None]
) -> None:
    """Rendered blocks -> a part in `directory`. Raises the error of the first bad row. places: where the source's rows
    stand, all of them when the blocks are through.   progress: told the rows done."""
    seen = rows = tokens = supervised = 0
    first = True
    with (
        contextlib.closing(blocks),
        contextlib.closing(RowWriter(directory)) as writer,
        (directory / "blocks.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for place, block in blocks:
            if block.error is not None:
                raise block.error
            line = {"block": place, "rows": len(block.table), "tokens": len(block.ids), "counts": vars(block.counts)}
            if block.bad:
                line["bad"] = block.bad
            if first and block.sample:  # of a source the first is shown, so of a part no other can be
                line["sample"], first = block.sample, False
            lines.write(json.dumps(line) + "\n")
            writer.append(block.ids, block.mask, block.table, block.spans)
            seen, tokens = seen + block.counts.seen, tokens + len(block.ids)
            rows, supervised = rows + len(block.table), supervised + int(block.table["supervised"].sum())
            progress(seen)
        counts = {"seen": seen, "rows": rows, "tokens": tokens, "supervised_tokens": supervised}
        writer.finish({**counts, "files": places.files})


def read_part(directory: Path, places: Places) -> Generator[NumberedBlock, None, None]:
    """The blocks of a part, as they were rendered. (Read, not mapped: another process may remove the part.)

    places: told where the source's rows stand."""
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    places.files[:] = places.files or map(tuple, meta["files"])
    table, all_spans, row = np.load(directory / "rows.npy"), read_spans(directory), 0
    with (
        (directory / "blocks.jsonl").open(encoding="utf-8") as lines,
        (directory / "ids.bin").open("rb") as ids,
        (directory / "mask.bin").open("rb") as mask,
    ):
        for line in map(json.loads, lines):
            n, counts = line["tokens"], line["counts"]
            rows = table[row : row + line["rows"]].copy()
            rows["start"] -= rows["start"][:1]
            first, last = np.searchsorted(all_spans["row"], [row, row + len(rows)])
            spans = all_spans[first:last].copy()
            spans["row"] -= row
            row += len(rows)
            for name in ("dropped", "ignored"):
                counts[name] = Counter(counts[name])
            yield (
                line["block"],
                Block(
                    np.frombuffer(ids.read(4 * n), np.int32),
                    np.frombuffer(mask.read(n), np.int8),
                    rows,
                    Counts(**counts),
                    line.get("bad", []),
                    line.get("sample"),
                    spans=spans,
                ),
            )
