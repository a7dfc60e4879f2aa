"""Plain text, taught as a base is pretrained on it: documents, with the tokens that keep them apart, all supervised.

{"text": "Once upon a time ..."}            a row of nothing else; or any row of the source `{source: text, path: ...}`
{"text": "... and so he", "ends": false}    the beginning of a document, or a piece of it: it does not end here

    "hi"  ->  ids   B hi E      B: what the tokenizer itself puts in front of a text, as a BOS; often nothing
              mask  0  1 1      E: the base's end of text, `end_of_text`

A row that nobody has called plain text is not taken for it where it may be a conversation: ready text is read as one
(`ready_text`), and what a chat format has written already is refused. Where the recipe says `source: text` all of it is
text, and so is a control token that it spells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from sftflow.chat.row_keys import REFUSED, ROW_FLAGS, absent, refuse
from sftflow.chat.turns import weight_of
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import check_plain, kind_of

TEXT, ENDS = "text", "ends"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>")
"""what bases call the end of a text by"""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>")
"""`eos_token` of checkpoints that were taught to chat: of no text the end"""
MOST_BYTES = 8 << 20
"""of one document, which is encoded at once: that takes some hundred times as much memory"""

TOO_LARGE = (
    f"one text of more than {MOST_BYTES >> 20} MB",
    'cut it into documents, each a row: {"text": ...}, with "ends": false where the next goes on',
)


class PlainText(NamedTuple):
    """A row as it stands (its line's bytes, or with the names of its columns) that the recipe says is plain text."""

    row: Any


@dataclass(frozen=True, slots=True)
class Document:
    """ends: whether the text ends here, so that the end of text is taught behind it.   declared: whether the recipe
    says that it is plain text.   ids: of a piece of a longer document its tokens, which then stand for the text."""

    text: str
    ends: bool = True
    declared: bool = False
    ids: tuple[int, ...] | None = None

    @property
    def is_empty(self) -> bool:
        return self.ids is None and not self.text.strip()

    def to_row(self) -> dict[str, Any]:
        return {TEXT: self.text, **({} if self.ends else {ENDS: False})}


class TextRow(NamedTuple):
    """weight: what the loss of its tokens is multiplied by, 0 to 1.   ignored: other keys that are not empty."""

    document: Document
    weight: int | float
    ignored: tuple[str, ...]


def read_text_row(row: Any, place: str, ignored: Collection[str] = (), *, declared: bool) -> TextRow:
    """A row that is plain text. Raises SchemaError where it has no text, or a key that changes what would be taught.

    >>> read_text_row({"text": "Once", "url": "x"}, "x:1", declared=True)
    TextRow(document=Document(text='Once', ends=True, declared=True, ids=None), weight=1, ignored=('url',))
    """
    if not isinstance(row, dict):
        raise SchemaError(place, f"a row is {kind_of(row)}", 'make it an object: {"text": ...}')
    refuse({key: value for key, value in row.items() if value is not None}, REFUSED, place)
    if TEXT not in row:
        names = ", ".join(map(repr, list(row)[:4])) + (", ..." if len(row) > 4 else "")
        fact = f"no text in its keys ({names})"
        raise SchemaError(
            place, fact, "name its column: columns: {ITS_NAME: text}; conversations are named as files, without text"
        )
    text = "" if row[TEXT] is None else row[TEXT]
    if not isinstance(text, str):
        raise SchemaError(f"{place}.{TEXT}", f"it is {kind_of(text)}", "make it a string")
    check_plain(text, f"{place}.{TEXT}")
    if len(text) > MOST_BYTES:
        raise SchemaError(f"{place}.{TEXT}", *TOO_LARGE)
    ends = True if row.get(ENDS) is None else row[ENDS]
    if not isinstance(ends, bool):
        raise SchemaError(f"{place}.{ENDS}", f"it is {kind_of(ends)}", "write false where the document goes on")
    flags = {key: row[key] for key in ROW_FLAGS if not absent(row.get(key))}
    others = {key for key, value in row.items() if key not in (TEXT, ENDS, *ROW_FLAGS) and not absent(value)}
    weight = weight_of(flags, place) if flags else 1
    return TextRow(Document(text, ends, declared), weight, tuple(sorted({*ignored, *others})))


def is_alone(row: Mapping[str, Any]) -> bool:
    """Whether a row says nothing but a text.

    >>> is_alone({"text": "a", "weight": 1, "id": None}), is_alone({"text": "a", "label": 3})
    (True, False)
    """
    return all(key in (TEXT, ENDS, *ROW_FLAGS) or absent(value) for key, value in row.items())


def end_of_text(names: Mapping[str, str], special: Collection[str], turn_ends: Collection[str | None]) -> str | None:
    """The token that ends a document: the tokenizer's `eos_token`, or what else its base calls the end of a text; None
    where there is none: what only ends turns is never put behind a document.

    names: what the tokenizer calls its tokens by.   special: the control tokens.   turn_ends: what the format ends
    turns with.

    >>> end_of_text({"eos_token": "<|im_end|>"}, ["<|im_end|>", "<|endoftext|>"], [])
    '<|endoftext|>'
    """
    eos = names.get("eos_token")
    if eos is None or eos in END_OF_TEXT or eos == names.get("bos_token"):
        return eos
    known = next((token for token in END_OF_TEXT if token in special), None)
    return known or (None if eos in TURN_ENDS or eos in turn_ends else eos)


def pieces(n: int, longest: int) -> list[tuple[int, int]]:
    """(begin, end) of the pieces that n tokens are cut into, one after another; none of a single token, of which
    nothing could be taught.

    >>> pieces(9, 4), pieces(10, 4), pieces(4, 4)
    ([(0, 4), (4, 7), (7, 9)], [(0, 4), (4, 8), (8, 10)], [(0, 4)])
    """
    cuts = [*range(0, n, longest), n]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1
    return list(pairwise(cuts))


def piece_of(document: Document, ids: tuple[int, ...], text: str, *, last: bool) -> Document:
    """A piece of a longer document.   ids, text: its own.   last: whether the document ends with it."""
    return replace(document, text=text, ids=ids, ends=document.ends and last, declared=True)
