"""The rows of data files, each with its place, as errors name it.

What a file holds is seen from its first bytes, whatever its name says: JSON lines, one JSON array, Parquet, Arrow; all
but the last two also packed. A table (CSV, TSV) is known by its name or its header. `FILE:17` is line 17 of JSON lines
and of a table, row 17 of anything else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sftflow.chat.files.columns import Wanted, read_columns
from sftflow.chat.files.names import TEXT_ENDINGS, Places, files_of, unpacked
from sftflow.chat.files.packed import COLUMNS, PACKED_ENDINGS, opened
from sftflow.chat.files.sets import DataFile
from sftflow.chat.files.table import ENDINGS, is_header, read_table
from sftflow.chat.plain_text import MOST_BYTES, TOO_LARGE
from sftflow.chat.schema import Conversation, parse_line, parse_row
from sftflow.foundation.errors import DataError
from sftflow.foundation.json_values import check_texts, parse_json

Numbered = Generator[tuple[int, Any], None, tuple[int, int]]
"""(number in the file, row) of its rows; returns how many there are, and the last one's number"""


def read_lines(name: str, place: str = "") -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines of a file, packed or not, that are not blank. Raises DataError where it cannot
    be read."""
    number = 0
    with opened(Path(name), place) as (file, _):
        for ended in file:  # by "\n"; a lone "\r" ends a line, too, as on old machines: inside JSON it is blank space
            for line in ended.rstrip(b"\r\n").split(b"\r"):
                number += 1
                if line.strip():
                    yield number, line


def read_rows(source: str | Path, *, plain: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, raw row) of whatever a name means: a file, the files of a pattern or a folder, or a data set
    `hub:NAME[:SPLIT]`.   plain: of plain text, see `numbered_rows`.

    Raises DataError naming the file and line where a row cannot be read.
    """
    places = Places()
    for number, row in numbered_rows(str(source), places=places, plain=plain):
        place = places[number]
        if isinstance(row, bytes):
            yield place, parse_line(row, place)
        else:
            check_texts(row, place)
            yield place, row


def numbered_rows(
    name: str, wanted: Wanted | None = None, places: Places | None = None, *, plain: bool = False
) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, but (number, raw row), and the row of a file of JSON lines is its line's bytes, not yet
    parsed. Numbers count on through several files.   wanted: told a row's index, from 0, whether it is asked for; None:
    all are.   places: told where each file begins.   plain: of plain text, where a file of TEXT_ENDINGS is one row."""
    n = last = 0
    for file in files_of(name, plain=plain):
        if places is not None:
            places.begin(last, file.place)
        read = _whole_text if plain and unpacked(file.place).endswith(TEXT_ENDINGS) else _numbered
        rows = read(file, wanted and partial(_from, wanted, n))
        if last:
            rows = _counted_on(rows, last)
        of_file, end = yield from rows
        n, last = n + of_file, last + end


def _from(wanted: Wanted, n: int, i: int) -> bool:
    return wanted(n + i)


def _counted_on(rows: Numbered, before: int) -> Numbered:
    while True:
        try:
            number, row = next(rows)
        except StopIteration as end:
            found: tuple[int, int] = end.value
            return found
        yield before + number, row


def _whole_text(file: DataFile, wanted: Wanted | None) -> Numbered:
    """A file that is one document. Raises DataError where it is too long to be one."""
    if wanted is None or wanted(0):
        with opened(file.path(), file.place) as (raw, _):
            data = raw.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise DataError(file.place, *TOO_LARGE)
            text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # every end of a line as "\n"
        yield 1, {"text": text}
    return 1, 1


def _numbered(file: DataFile, wanted: Wanted | None) -> Numbered:
    path, place = file.path(), file.place
    ending = next((e for e in reversed([s.lower() for s in path.suffixes[-2:]]) if e not in PACKED_ENDINGS), "")
    with opened(path, place) as (_, head):
        pass
    if head in COLUMNS or ending == ".parquet":
        return read_columns(path, place, head, wanted)
    _, first = next(read_lines(str(path), place), (0, b""))
    named = ending in ENDINGS and first.lstrip()[:1] not in (b"{", b"[")
    if first and (named or is_header(first.decode("utf-8", "replace"))):
        return _table(path, place, ending, wanted)
    if first and _is_whole(path, place, first.strip()):
        return _rows_of(enumerate(_read_json(path, place), 1), wanted)
    return _rows_of(read_lines(str(path), place), wanted)


def _rows_of(rows: Iterator[tuple[int, Any]], wanted: Wanted | None) -> Numbered:
    n = number = 0
    for number, row in rows:
        if wanted is None or wanted(n):
            yield number, row
        n += 1
    return n, number


def _table(path: Path, place: str, ending: str, wanted: Wanted | None) -> Numbered:
    with opened(path, place) as (file, _):
        return (yield from read_table(file, ending, place, wanted))


def _is_whole(path: Path, place: str, first: bytes) -> bool:
    """Whether a text is one JSON value, and not one a line, by its first line. (A line that is a list of messages is a
    row.) Raises DataError where it is neither, by its name too."""
    named = {suffix.lower() for suffix in path.suffixes[-2:]}
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        if first == b"{" and ".json" not in named:
            raise DataError(place, "an object over several lines", "write each row in one line") from None
        following = {line.strip()[:1] for _, line in islice(read_lines(str(path), place), 1, 3)}
        torn = following & {b"[", b"{"} or (not following and first[:1] != b"<")  # one bad line of a file of rows
        if first[:1] not in b"[{" and not (torn and named & {".json", ".jsonl", ".ndjson"}):
            fact = f"neither JSON, Parquet nor a table (it begins with {first[:20].decode('utf-8', 'replace')!r})"
            raise DataError(place, fact, "write its rows as JSON lines") from None
        return first[:1] == b"[" or ".json" in named
    return isinstance(value, list) and not (value and all(map(_is_message, value)))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def _read_json(path: Path, place: str) -> Iterator[Any]:
    with opened(path, place) as (file, _):
        rows = parse_json(file.read(), place, whole=True)
    yield from rows if isinstance(rows, list) else [rows]


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """Every row of a data file as a Conversation. Raises SchemaError or DataError at the first bad one."""
    for place, row in read_rows(source):
        yield parse_row(row, place)
