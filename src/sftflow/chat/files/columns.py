"""The rows of Parquet and Arrow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sftflow.chat.files.packed import ARROW, COLUMNS, STREAM
from sftflow.foundation.errors import DataError, first_line
from sftflow.foundation.json_values import loads, without_nulls

Wanted = Callable[[int], bool]


def read_columns(
    path: Path, place: str, head: bytes, wanted: Wanted | None
) -> Generator[tuple[int, Any], None, tuple[int, int]]:
    """(number from 1, row) of a Parquet file, or of Arrow's: a file, or a stream, as `datasets` keeps them. Those that
    are not wanted are not made into Python's objects, which is what takes time. Returns the number of rows, twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        with contextlib.ExitStack() as files:
            if head in (ARROW, STREAM):
                mapped = files.enter_context(pa.memory_map(str(path)))
                reader = pa.ipc.open_file(mapped) if head == ARROW else pa.ipc.open_stream(mapped)
                batches = iter(reader) if head == STREAM else map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pq.ParquetFile(files.enter_context(path.open("rb"))).iter_batches()
            for batch in batches:
                check_columns(batch.schema.names, place)
                batch.validate(full=True)  # Arrow believes the offsets in a damaged file
                kept_as_json = _json_columns(batch.schema)
                for start, end in _runs(wanted, first, first + batch.num_rows):
                    rows = batch.slice(start - first, end - start).to_pylist(maps_as_pydicts="strict")
                    for number, row in enumerate(rows, start + 1):
                        for name in kept_as_json:
                            row[name] = _decoded(row[name], kept_as_json[name])
                        yield number, without_nulls(row)
                first += batch.num_rows
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # of many kinds: pyarrow's, a key twice in a map, a date beyond Python's
        fact = f"cannot be read as {COLUMNS.get(head, 'Parquet')} ({type(error).__name__}: {first_line(error)})"
        remedy = "write or download it again"
        if head not in COLUMNS:
            fact = f"named {path.suffix}, and no Parquet file" if head else "it is empty"
            remedy = "name it as what it is, or download it again" if head else remedy
        raise DataError(place, fact, remedy) from None
    return first, first


def _runs(wanted: Wanted | None, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The wanted indexes of start <= i < end, as runs of neighbours (start, end).

    >>> list(_runs(lambda i: i % 4 < 2, 5, 11))
    [(5, 6), (8, 10)]
    """
    for taken, run in groupby(range(start, end), wanted or (lambda _: True)):
        if taken:
            indexes = list(run)
            yield indexes[0], indexes[-1] + 1


def _json_columns(schema: Any) -> dict[str, Any]:
    """The columns in which `datasets` keeps values of mixed types as JSON texts, each with its feature there."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (about.get("info") or {}).get("features") or {}
    return {name: f for name, f in features.items() if name in schema.names and '"_type": "Json"' in json.dumps(f)}


def _decoded(value: Any, feature: Any) -> Any:
    """A value whose parts of the feature Json are JSON texts -> the value."""
    if value is None or (isinstance(feature, dict) and feature.get("_type") == "Json"):
        return value if value is None else loads(value)
    if isinstance(feature, list):  # an older writing of List
        return [_decoded(inner, feature[0]) for inner in value]
    if "feature" in feature and "_type" in feature:
        return [_decoded(inner, feature["feature"]) for inner in value]
    if isinstance(value, dict):
        return {key: _decoded(inner, feature[key]) if key in feature else inner for key, inner in value.items()}
    return value


def check_columns(names: Sequence[str], place: str) -> None:
    """Raises DataError where a table has a column twice, of which all but the last would be lost."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(place, f"the column {twice[0]!a} stands twice", "keep one of them")
