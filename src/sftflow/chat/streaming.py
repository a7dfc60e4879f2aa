"""The protocol of everything that reads a reply while it is made: ids -> text -> text up to a stop text -> tool calls.

    decoder.feed(a), decoder.feed(b), decoder.flush()
    decoder.feed(a + b), decoder.flush()

What these return, joined, is the same: it does not depend on how the input was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

Piece = TypeVar("Piece", contravariant=True)
Out = TypeVar("Out", covariant=True)


class StreamDecoder(Protocol[Piece, Out]):
    """Holds back what may yet turn out to be something else: half a character, the beginning of a stop text or call."""

    def feed(self, piece: Piece) -> Out:
        """What is certain after this piece."""
        ...

    def flush(self) -> Out:
        """Nothing more comes: what was held back."""
        ...


def outputs(decoder: StreamDecoder[Piece, Out], pieces: Iterable[Piece]) -> list[Out]:
    """What is certain after each piece, and last what was held back then."""
    return [*(decoder.feed(piece) for piece in pieces), decoder.flush()]


def held_back(text: str, words: Sequence[str]) -> int:
    """How many characters at the text's end may be the beginning of one of the words.

    >>> held_back("so 3\\n", ["\\n\\n"]), held_back("a <tool", ["<tool_call>", "l?"]), held_back("all", ["x"])
    (1, 5, 0)
    """
    longest = max(map(len, words), default=0)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in sizes if any(n < len(w) and w.startswith(text[-n:]) for w in words)), 0)
