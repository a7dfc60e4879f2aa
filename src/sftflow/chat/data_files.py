"""The rows of a data file or a hub data set, each with its place, as errors name it."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftflow.chat.schema import Conversation, parse_line, parse_row
from sftflow.foundation.errors import DataError
from sftflow.foundation.json_values import kind_of, loads, without_nulls


@contextlib.contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Around the reading of a file. Raises DataError, which names it, where it is not there or cannot be read."""
    name = str(file)
    if not Path(file).is_file():
        raise DataError(name, "no such file", "check the path; a hub data set is written hub:OWNER/NAME")
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(name, f"not UTF-8 text ({error.reason} at byte {error.start})", "convert it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(name, f"cannot be unpacked ({error})", "download it again") from None
    except OSError as error:
        raise DataError(name, f"cannot be read ({error.strerror or error})", "check the file") from None


def read_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines of a file, gzipped or not, that are not blank. Raises DataError where it cannot
    be read."""
    path = Path(name)
    with readable(name), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def read_rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, raw row) of a .jsonl (also .gz), .json or .parquet file, or of a hub data set `hub:NAME[:SPLIT]`.

    Raises DataError naming the file and line where a row cannot be read.
    """
    for number, row in numbered_rows(str(source)):
        place = f"{source}:{number}"
        yield place, parse_line(row, place) if isinstance(row, bytes) else row


def numbered_rows(name: str) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, but (number, raw row), and the row of a .jsonl file is its line's bytes, not yet parsed."""
    path = Path(name)
    if name.startswith("hub:"):
        return enumerate(_read_hub(name), 1)
    if path.suffix == ".parquet":
        return enumerate(_read_parquet(path), 1)
    return enumerate(_read_json(path), 1) if path.suffix == ".json" else read_lines(name)


def _read_json(path: Path) -> Iterator[Any]:
    try:
        with readable(path):
            rows = loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"not JSON ({error.msg})", "fix it") from None
    except ValueError as error:
        raise DataError(str(path), f"not JSON ({error})", "fix it") from None
    if not isinstance(rows, list):
        raise DataError(str(path), f"the file holds {kind_of(rows)}", "make it a list of rows, or use .jsonl")
    yield from rows


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with readable(path):
        for batch in pq.ParquetFile(path).iter_batches():
            try:
                rows = batch.to_pylist(maps_as_pydicts="strict")
            except (KeyError, ValueError, OverflowError) as error:  # a key twice in a map, a date beyond Python's
                raise DataError(str(path), f"a row cannot be read ({error})", "mend or remove it") from None
            yield from map(without_nulls, rows)


def _read_hub(name: str) -> Iterator[Any]:
    import datasets

    hub_id, _, split = name.removeprefix("hub:").partition(":")
    try:
        data = datasets.load_dataset(hub_id, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds, from HTTP errors to its own
        raise DataError(name, f"cannot be loaded ({type(error).__name__}: {error})", "check id and network") from None
    yield from map(without_nulls, data)


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """Every row of a data file as a Conversation. Raises SchemaError or DataError at the first bad one."""
    for place, row in read_rows(source):
        yield parse_row(row, place)
