"""The rows of CSV and TSV: a header, then a row of as many cells. All cells are texts, and an empty one is absent."""

from __future__ import annotations

import csv
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from sftflow.chat.files.columns import Wanted, check_columns
from sftflow.chat.row_keys import NOT_TEXTS, READ
from sftflow.foundation.errors import DataError
from sftflow.foundation.json_values import loads

LONGEST_CELL = 1 << 26
"""characters: what a quote that is never closed may swallow before it is named"""
ENDINGS = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}
"""how such files are named, and what may part their cells"""
_SAID = re.compile(r"""["']?sep=([,;\t|])["']?\s*""", re.IGNORECASE)
_JSON = re.compile(r"\s*(?:\[.*\]|\{.*\}|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false)\s*", re.DOTALL)


def is_header(line: str) -> bool:
    """Whether a text's first line is that of a table of rows: several names, of which we know one.

    >>> is_header("id,prompt,completion"), is_header("Once upon a time, in the output"), is_header("prompt")
    (True, False, False)
    """
    if line[:1] in "{[":
        return False
    for sep in ",;\t|":
        names = [name.strip().strip('"') for name in line.split(sep)]
        if len(names) > 1 and all(names) and len(set(names)) == len(names) and READ.keys() & set(names):
            return all(re.fullmatch(r"[\w .-]{1,40}", name) for name in names)
    return False


def read_table(
    file: Iterable[bytes], ending: str, place: str, wanted: Wanted | None
) -> Generator[tuple[int, Any], None, tuple[int, int]]:
    """(line on which it begins, row) of a table.   ending: of the file's name.   Returns (rows, their last line).

    Raises DataError, which names the line, where it is ragged or not quoted as CSV is.
    """
    csv.field_size_limit(LONGEST_CELL)
    texts = _Texts(file, place)
    n = last = begins = 0
    try:
        header = next((line for line in texts if line.strip()), "")
        if not header:
            return 0, 0
        if said := _SAID.fullmatch(header):  # as spreadsheets are told
            header = next(texts, "")
        separator = said[1] if said else _separator(header, ending, place)
        spaced = all(name[:1] == " " for name in header.split(separator)[1:])  # ", " parts the cells
        lines = _again(header, texts)
        rows = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=spaced)
        begins = texts.number
        names = [name.strip() or f"column {i}" for i, name in enumerate(next(rows), 1)]
        check_columns(names, place)
        while True:
            begins = texts.number + 1
            cells = next(rows, None)
            if cells is None:
                return n, last
            if not any(cells):
                continue
            if len(cells) != len(names):
                fact = f"{len(cells)} cells where the header has {len(names)} ({', '.join(names[:4])}...)"
                raise DataError(f"{place}:{begins}", fact, "mend or remove the row, or quote its texts")
            last = begins
            if wanted is None or wanted(n):
                yield begins, {name: value_of(name, cell) for name, cell in zip(names, cells, strict=True) if cell}
            n += 1
    except csv.Error as error:
        fact = f"not CSV ({error})"
        if "field limit" in str(error) or "unexpected end" in str(error):
            fact = "a quote that is opened here is never closed"
        raise DataError(f"{place}:{begins}", fact, 'a quote inside a quoted text is written twice: ""') from None


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _separator(header: str, ending: str, place: str) -> str:
    """What parts the cells, told by the header: what gives the most names that rows have, or the only one in it.
    Raises DataError where two would do."""

    def names(sep: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([header], delimiter=sep))]

    def parted(seps: str) -> list[str]:
        return [sep for sep in seps if len(names(sep)) > 1]

    others = (sep for sep in parted(ENDINGS[".csv"]) if READ.keys() & set(names(sep)))  # of a .tsv without tabs
    found = parted(ENDINGS.get(ending, ENDINGS[".csv"])) or [*others]
    if len(found) < 2:
        return found[0] if found else ENDINGS.get(ending, ",")[0]
    known = {sep: len(READ.keys() & set(names(sep))) for sep in found}
    best = [sep for sep in found if known[sep] == max(known.values())]
    if len(best) > 1:
        signs = " and by ".join(repr(sep) for sep in best)
        raise DataError(f"{place}:1", f"the header's names may be parted by {signs}", "quote the names in it")
    return best[0]


def value_of(name: str, cell: str) -> Any:
    """What a cell of a column holds: a text, or what is JSON in it where the column's rows have no texts."""
    if name in NOT_TEXTS:
        cell = cell.lower() if cell in ("True", "False", "TRUE", "FALSE") else cell  # as pandas and spreadsheets write
    if name in NOT_TEXTS and _JSON.fullmatch(cell):
        try:
            return loads(cell)
        except (ValueError, RecursionError):
            return cell  # what is wrong with it is said of the row
    return cell


class _Texts:
    """The lines of a file as texts, with their ends.   number: of the last one, from 1."""

    def __init__(self, lines: Iterable[bytes], place: str) -> None:
        self.number, self._place = 0, place
        self._lines = self._split(lines)

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def __next__(self) -> str:
        return next(self._lines)

    def _split(self, lines: Iterable[bytes]) -> Iterator[str]:
        for ended in lines:
            for line in re.findall(rb"[^\r]*\r\n?|[^\r]+$", ended) if b"\r" in ended[:-2] else (ended,):
                self.number += 1
                if b"\0" in line:
                    fact = "NUL bytes: it was not written to its end"
                    raise DataError(f"{self._place}:{self.number}", fact, "write or download it again")
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    fact = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                    raise DataError(f"{self._place}:{self.number}", fact, "save the file as UTF-8") from None
