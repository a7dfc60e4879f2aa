"""A rendered row token by token: each one's id, its own bytes, whether it is supervised, whether it is special.

A token is bytes first: a character may be spread over several tokens, and a token may hold parts of two characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftflow.chat.fast_bpe import byte_letters
from sftflow.chat.render import Rendered


@dataclass(frozen=True, slots=True)
class Token:
    """text: the token's bytes as text, with `\\xNN` for bytes that are no whole character; shown to people only.
    raw: its bytes.   weight: what its loss is multiplied by, where it is supervised."""

    id: int
    text: str
    raw: bytes
    supervised: bool
    special: bool = False
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        marks = {"supervised": self.supervised, "special": self.special}
        weight = {} if self.weight == 1 else {"weight": self.weight}
        return {"id": self.id, "text": self.text, "bytes": self.raw.hex(), **marks, **weight}


@dataclass(frozen=True, slots=True)
class TokenRow:
    """source: where the row came from.   turns: (first token, role) of each turn in order; () where they are not
    known.   refused: why the row could not be rendered, which has no tokens then; "" for all others."""

    source: str
    tokens: tuple[Token, ...] = ()
    turns: tuple[tuple[int, str], ...] = ()
    refused: str = ""

    @property
    def n_supervised(self) -> int:
        return sum(t.supervised for t in self.tokens)

    @property
    def weights(self) -> list[float] | None:
        """What each token's loss is multiplied by, 0 where it is not supervised; None where none counts in part."""
        if all(t.weight == 1 for t in self.tokens):
            return None
        return [t.weight * t.supervised for t in self.tokens]

    def to_json(self) -> dict[str, Any]:
        """As mask_example.json keeps it."""
        turns = [list(turn) for turn in self.turns]
        return {"source": self.source, "tokens": [t.to_json() for t in self.tokens], "turns": turns}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TokenRow:
        """A row of mask_example.json."""
        tokens = tuple(
            Token(t["id"], t["text"], bytes.fromhex(t["bytes"]), t["supervised"], t["special"], t.get("weight", 1.0))
            for t in row["tokens"]
        )
        return cls(source=row["source"], tokens=tokens, turns=tuple((start, role) for start, role in row["turns"]))


def token_row(rendered: Rendered, tokenizer: Any) -> TokenRow:
    """The tokens of a rendered row, with the mask."""
    ids = [int(i) for i in rendered.ids]
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    weights = np.where(rendered.mask, 1.0 if rendered.weights is None else rendered.weights, 1.0).tolist()
    tokens = tuple(
        Token(i, raw.decode("utf-8", "backslashreplace"), raw, bool(m), i in special, weight)
        for i, m, raw, weight in zip(ids, rendered.mask, token_bytes(tokenizer, ids), weights, strict=True)
    )
    turns = tuple((int(start), str(role)) for start, role in rendered.turns)
    return TokenRow(source=rendered.source, tokens=tokens, turns=turns)


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token stands for.

    Not by decoding tokens one at a time: that gives U+FFFD for a part of a character, and SentencePiece tokenizers
    strip the space that the first token begins with, which here would be every token.
    """
    known = {int(i): str(t.content).encode("utf-8", "replace") for i, t in tokenizer.added_tokens_decoder.items()}
    bytes_of_entry = _bytes_of_entry(tokenizer)
    different = [i for i in dict.fromkeys(ids) if i not in known]
    for i, piece in zip(different, tokenizer.convert_ids_to_tokens(different), strict=True):
        if piece is None:  # an id beyond the vocabulary: the embedding may have more rows than the tokenizer words
            known[i] = b""
        elif bytes_of_entry is None:
            known[i] = str(tokenizer.decode([i], skip_special_tokens=False)).encode("utf-8", "replace")
        else:
            known[i] = bytes_of_entry(piece)
    return [known[i] for i in ids]


def _bytes_of_entry(tokenizer: Any) -> Callable[[str], bytes] | None:
    """From a vocabulary entry to its bytes, as the tokenizer's own decoder does it; None for a decoder unknown here."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    # The decoder's state alone: the whole tokenizer as JSON would be a hundred thousand entries for every row.
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        table = {letter: byte for byte, letter in byte_letters().items()}
        return lambda piece: b"".join(bytes([table[c]]) if c in table else c.encode("utf-8", "replace") for c in piece)
    if not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        return None  # Fuse and Strip work on the whole text, so that they change nothing of one token
    replaced = [
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    replaced += [(step.get("replacement", "▁"), " ") for step in steps if step["type"] == "Metaspace"]

    def sentence_piece(piece: str) -> bytes:
        if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode("utf-8", "replace")

    return sentence_piece
