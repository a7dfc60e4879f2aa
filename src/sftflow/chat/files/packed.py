"""A data file's bytes: unpacked, behind a byte-order mark; or what else the file is."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sftflow.foundation.errors import DataError, said_of
from sftflow.foundation.missing import not_there

MARK = b"\xef\xbb\xbf"
PARQUET, ARROW, STREAM = b"PAR1", b"ARRO", b"\xff\xff\xff\xff"
COLUMNS = {PARQUET: "Parquet", ARROW: "Arrow", STREAM: "Arrow"}
NOT_READ = {
    b"PK\x03\x04": ("a zip archive, or a spreadsheet", "unpack it, or write its rows as JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "get the file itself: git lfs pull"),
}
"""what other files begin with: (fact, remedy)"""


def _unzstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


PACKED: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _unzstd),
}
"""what packed files begin with: (what packed them, what opens them)"""
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")


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
            raise DataError(name, fact, "give the path of a file")
        if path.exists() and not path.is_file():
            raise DataError(name, "not a file: a pipe or a device", "it is read more than once; write it to a file")
        if not path.is_file():
            raise DataError(name, *not_there(name, otherwise="check the path; a hub data set is hub:OWNER/NAME"))
        yield
    except UnicodeDecodeError as error:
        fact = f"not UTF-8 text ({error.reason} at byte {error.start})"
        torn = error.reason == "unexpected end of data"
        raise DataError(name, fact, "download it again, or save it as UTF-8" if torn else "save it as UTF-8") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(name, f"cannot be unpacked ({error})", "download it again") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            place = f"{name[:40]}... ({len(name):,} characters)"
            raise DataError(place, "too long for a path", "give the path of a file") from None
        if error.errno is None:  # what a library says of the bytes, and not the system of the file
            raise DataError(name, f"cannot be unpacked ({error})", "download it again") from None
        fact, remedy = said_of(error)
        raise DataError(name, f"cannot be read ({fact})", remedy) from None


@contextlib.contextmanager
def opened(path: Path, place: str = "") -> Iterator[tuple[IO[bytes], bytes]]:
    """(the file's bytes, unpacked, behind a byte-order mark; the first four of them). Raises DataError where it is a
    file that nobody here reads.   place: what errors call it."""
    name = place or str(path)
    with readable(path), contextlib.ExitStack() as files:
        with path.open("rb") as raw:
            begins = raw.read(6)
        packing = next((PACKED[mark] for mark in PACKED if begins.startswith(mark)), None)

        def again() -> IO[bytes]:
            return files.enter_context(packing[1](path) if packing else path.open("rb"))

        head = again().read(24)
        for mark, (fact, remedy) in NOT_READ.items():
            if head.startswith(mark):
                raise DataError(name, fact, remedy)
        encoding = json.detect_encoding(head).upper()  # by a mark, or by where the first letters have zeros
        if not encoding.startswith("UTF-8") and any(head):
            raise DataError(name, f"{encoding[:6]} text", "convert it to UTF-8")
        if packing and head[:4] in COLUMNS:
            raise DataError(name, f"{_a(COLUMNS[head[:4]])} file packed with {packing[0]}", "unpack it")
        file = again()
        if head.startswith(MARK):
            file.read(len(MARK))
            head = head[len(MARK) :]
        yield file, head[:4]


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"
