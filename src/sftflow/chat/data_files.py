"""The rows of a data file or a hub data set, each with its place, as errors name it.

What a file holds is seen from its first bytes, whatever its name says: JSON lines, one JSON array, Parquet, Arrow, and
the first two also packed with gzip. `FILE:17` is line 17 of JSON lines, row 17 of anything else.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, TypeVar

from sftflow.chat.schema import Conversation, parse_line, parse_row
from sftflow.foundation.errors import DataError, first_line, said_of
from sftflow.foundation.json_values import check_texts, parse_json, without_nulls
from sftflow.foundation.missing import not_there

T = TypeVar("T")
Wanted = Callable[[int], bool]
PACKED, MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
PARQUET, ARROW, STREAM = b"PAR1", b"ARRO", b"\xff\xff\xff\xff"
NOT_READ = {
    b"BZh": ("packed with bzip2", "unpack it, or pack it with gzip"),
    b"PK\x03\x04": ("a zip archive, or a spreadsheet", "unpack it, or write its rows as JSON lines"),
    b"\xfd7zXZ\0": ("packed with xz", "unpack it, or pack it with gzip"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "unpack it, or pack it with gzip"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "get the file itself: git lfs pull"),
}
"""what other files begin with: (fact, remedy)"""


@contextlib.contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Around the reading of a file. Raises DataError, which names it, where it is not there or cannot be read."""
    name, path = str(file), Path(file)
    try:
        if path.is_dir():
            inside = sorted(f"{p.name}/" if p.is_dir() else p.name for p in path.iterdir() if p.name[0] != ".")
            if not inside:
                raise DataError(name, "an empty folder, not a file", "give the path of a file")
            fact = f"a folder, not a file (in it: {', '.join(inside[:3])}{', ...' if inside[3:] else ''})"
            raise DataError(name, fact, "give one file; in a recipe's mixture, each as a source")
        if path.exists() and not path.is_file():
            raise DataError(name, "not a file: a pipe or a device", "it is read more than once; write it to a file")
        if not path.is_file():
            raise DataError(name, *not_there(name, otherwise="check the path; a hub data set is hub:OWNER/NAME"))
        yield
    except UnicodeDecodeError as error:
        fact = f"not UTF-8 text ({error.reason} at byte {error.start})"
        torn = error.reason == "unexpected end of data"
        raise DataError(name, fact, "download it again, or save it as UTF-8" if torn else "save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(name, f"cannot be unpacked ({error})", "download it again") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            place = f"{name[:40]}... ({len(name):,} characters)"
            raise DataError(place, "too long for a path", "give the path of a file") from None
        fact, remedy = said_of(error)
        raise DataError(name, f"cannot be read ({fact})", remedy) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes, unpacked where gzip packed them, behind a byte-order mark. Raises DataError where it is a file
    that nobody here reads."""
    with readable(path), contextlib.ExitStack() as files:
        file: IO[bytes] | gzip.GzipFile = files.enter_context(path.open("rb"))
        packed = file.read(2) == PACKED
        file.seek(0)
        if packed:
            file = files.enter_context(gzip.open(path))
        head = file.read(24)
        file.seek(len(MARK) if head.startswith(MARK) else 0)
        for begins, (fact, remedy) in NOT_READ.items():
            if head.startswith(begins):
                raise DataError(str(path), fact, remedy)
        encoding = json.detect_encoding(head).upper()  # by a mark, or by where the first letters have zeros
        if not encoding.startswith("UTF-8") and any(head):
            raise DataError(str(path), f"{encoding[:6]} text", "convert it to UTF-8")
        if packed and head.startswith(PARQUET):
            raise DataError(str(path), "a Parquet file packed with gzip", "unpack it")
        yield file


def read_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines of a file, gzipped or not, that are not blank. Raises DataError where it cannot
    be read."""
    number = 0
    with _opened(Path(name)) as file:
        for ended in file:  # by "\n"; a lone "\r" ends a line, too, as on old machines: inside JSON it is blank space
            for line in ended.rstrip(b"\r\n").split(b"\r"):
                number += 1
                if line.strip():
                    yield number, line


def read_rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, raw row) of a file of JSON lines, a JSON array, Parquet or Arrow, or of a hub data set
    `hub:NAME[:SPLIT]`.

    Raises DataError naming the file and line where a row cannot be read.
    """
    for number, row in numbered_rows(str(source)):
        place = f"{source}:{number}"
        if isinstance(row, bytes):
            yield place, parse_line(row, place)
        else:
            check_texts(row, place)
            yield place, row


def numbered_rows(name: str, wanted: Wanted | None = None) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, but (number, raw row), and the row of a file of JSON lines is its line's bytes, not yet
    parsed.   wanted: told a row's index, from 0, whether it is asked for; None: all are."""
    if name.startswith("hub:"):
        return _those(wanted, enumerate(_read_hub(name), 1))
    path = Path(name)
    with _opened(path) as file:
        head = file.read(4)
        if head in (PARQUET, ARROW, STREAM) or path.suffix.lower() == ".parquet":
            return _read_columns(path, head, wanted)
    _, first = next(read_lines(name), (0, b""))
    if first and _is_whole(path, first.strip()):
        return _those(wanted, enumerate(_read_json(path), 1))
    return _those(wanted, read_lines(name))


def _those(wanted: Wanted | None, rows: Iterator[T]) -> Iterator[T]:
    return rows if wanted is None else (row for i, row in enumerate(rows) if wanted(i))


def _is_whole(path: Path, first: bytes) -> bool:
    """Whether a text is one JSON value, and not one a line, by its first line. (A line that is a list of messages is a
    row.) Raises DataError where it is neither, by its name too."""
    named = {suffix.lower() for suffix in path.suffixes[-2:]}
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        if first == b"{" and ".json" not in named:
            raise DataError(str(path), "an object over several lines", "write each row in one line") from None
        following = {line.strip()[:1] for _, line in islice(read_lines(str(path)), 1, 3)}
        torn = following & {b"[", b"{"} or (not following and first[:1] != b"<")  # one bad line of a file of rows
        if first[:1] not in b"[{" and not (torn and named & {".json", ".jsonl", ".ndjson"}):
            fact = f"neither JSON nor Parquet (it begins with {first[:20].decode('utf-8', 'replace')!r})"
            raise DataError(str(path), fact, "write its rows as JSON lines") from None
        return first[:1] == b"[" or ".json" in named
    return isinstance(value, list) and not (value and all(map(_is_message, value)))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def _read_json(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        rows = parse_json(file.read(), str(path), whole=True)
    yield from rows if isinstance(rows, list) else [rows]


def _read_columns(path: Path, head: bytes, wanted: Wanted | None) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file, or of Arrow's: a file, or a stream, as `datasets` keeps them. Those that are not
    wanted are not made into Python's objects, which is what takes time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = "Arrow" if head in (ARROW, STREAM) else "Parquet"
    try:
        with path.open("rb") as file:
            if head == ARROW:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = pa.ipc.open_stream(file) if head == STREAM else pq.ParquetFile(file).iter_batches()
            first = 0
            for batch in batches:
                check_columns(batch.schema.names, str(path))
                batch.validate(full=True)  # Arrow believes the offsets in a damaged file
                for start, end in _runs(wanted, first, first + batch.num_rows):
                    rows = batch.slice(start - first, end - start).to_pylist(maps_as_pydicts="strict")
                    yield from enumerate(map(without_nulls, rows), start + 1)
                first += batch.num_rows
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # of many kinds: pyarrow's, a key twice in a map, a date beyond Python's
        fact = f"cannot be read as {kind} ({type(error).__name__}: {first_line(error)})"
        remedy = "write or download it again"
        if head not in (PARQUET, ARROW, STREAM):
            fact = f"named {path.suffix}, and no {kind} file" if head else "it is empty"
            remedy = "name it as what it is, or download it again" if head else remedy
        raise DataError(str(path), fact, remedy) from None


def _runs(wanted: Wanted | None, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The wanted indexes of start <= i < end, as runs of neighbours (start, end).

    >>> list(_runs(lambda i: i % 4 < 2, 5, 11))
    [(5, 6), (8, 10)]
    """
    for taken, run in groupby(range(start, end), wanted or (lambda _: True)):
        if taken:
            indexes = list(run)
            yield indexes[0], indexes[-1] + 1


def check_columns(names: Sequence[str], place: str) -> None:
    """Raises DataError where a table has a column twice, of which all but the last would be lost."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(place, f"the column {twice[0]!a} stands twice", "keep one of them")


def _read_hub(name: str) -> Iterator[Any]:
    import datasets

    hub_id, _, split = name.removeprefix("hub:").partition(":")
    try:
        yield from map(without_nulls, datasets.load_dataset(hub_id, split=split or "train", streaming=True))
    except Exception as error:  # the library raises many kinds, from HTTP errors to its own
        text, remedy = str(error), "check id and network"
        if "Config name is missing" in text or "BuilderConfig" in text:
            remedy = "sets of several configurations are not read; download the one that is meant, and name its file"
        elif "Unknown split" in text or ("split" in text and isinstance(error, ValueError)):
            remedy = f"write one of its splits: hub:{hub_id}:SPLIT"
        elif "gated" in text.lower() or "401" in text or "403" in text:
            remedy = "accept its terms on its page there, and set HF_TOKEN or run: hf auth login"
        elif "dataset script" in text.lower() or "trust_remote_code" in text:
            remedy = "code from the hub is not run; download its files in Parquet or JSON lines"
        raise DataError(name, f"cannot be read ({type(error).__name__}: {first_line(error)})", remedy) from None


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """Every row of a data file as a Conversation. Raises SchemaError or DataError at the first bad one."""
    for place, row in read_rows(source):
        yield parse_row(row, place)
