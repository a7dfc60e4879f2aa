"""Large answers as JSON, in slices: one `json.dumps` of megabytes would keep the event loop's thread waiting to its
end, for Python's C encoder lets no other thread run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

SLICE = 32
"""elements of a list that are encoded at once; with 20 likeliest tokens each they take a millisecond"""
PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# ASCII only: readers that split lines as Python does would break events at U+2028 and its like.
EVENT = json.JSONEncoder()


def slices(value: Any, encoder: json.JSONEncoder = PLAIN) -> Iterator[str]:
    """Its JSON, the same as at once, in pieces.

    >>> "|".join(slices({"a": [1, 2], "b": {}}))
    '{|"a":|[|1,2|]|,|"b":|{}|}'
    """
    if isinstance(value, dict) and value:
        yield "{"
        for number, (key, inner) in enumerate(value.items()):
            if number:
                yield encoder.item_separator
            yield encoder.encode(key) + encoder.key_separator
            yield from slices(inner, encoder)
        yield "}"
    elif isinstance(value, list) and value:
        yield "["
        for start in range(0, len(value), SLICE):
            yield (encoder.item_separator if start else "") + encoder.encode(value[start : start + SLICE])[1:-1]
        yield "]"
    else:
        yield encoder.encode(value)


def to_json(value: Any) -> bytes:
    """In one go: for what is small, or a thread's own."""
    return PLAIN.encode(value).encode()
