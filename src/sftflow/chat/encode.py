"""Text -> ids, with the token index of every control token and of every boundary between prompt and reply.

    "B U hi /U"  ->  B  U  hi  /U
                     where the template wrote B, U and /U they are special tokens (literals);
                     where the content did (look-alikes) they stay text.

Which of the two a string is, is the caller's to say: it knows which parts of the text are the template's.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.fast_bpe import WordCache
from sftflow.chat.fewest_tokens import FewestTokens
from sftflow.foundation.errors import MaskError

Literal = tuple[int, int, str]  # (start, end, token): a control token the template itself wrote
Piece = tuple[str, str]  # ("special", token) or ("content", text)
Int = NDArray[np.int64]

TWIN_OPEN, TWIN_CLOSE = "\uf8f0", "\uf8f1"  # private-use characters around a special token's name in the twin


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: (n,).   literals: token index of each literal, in order.   cuts: token index of each boundary, in order.
    splits: boundaries that a token would have straddled, encoded on both sides separately."""

    ids: Int
    literals: Int
    cuts: tuple[int, ...]
    splits: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of text, encoded: its ids twice, and the token index of each control token."""

    ids: list[int]
    array: Int
    special: Int


def pieces_of(text: str, literals: list[Literal]) -> list[Piece]:
    """The text as ("special", token) and ("content", text between them)."""
    pieces: list[Piece] = []
    at = 0
    for start, end, token in literals:
        if start > at:
            pieces.append(("content", text[at:start]))
        pieces.append(("special", token))
        at = end
    if at < len(text):
        pieces.append(("content", text[at:]))
    return pieces


class Encoder:
    """Encodes with one tokenizer, but lets only literals become control tokens. `encoder_of` makes it.

    encoder = encoder_of(tokenizer_text(tokenizer))
    encoder.encode(text, encoder.literals(text), [reply_start], "data.jsonl:17").ids

    special: id of each control token: those that the tokenizer marks special, and the ends of turns that it does not.
    added: id of each token that stands beside the vocabulary, as `<think>`; the control tokens are among them.
    """

    def __init__(self, tokenizer: str, ends: tuple[str, ...] = ()) -> None:
        """tokenizer: its tokenizer.json.   ends: added tokens at which generation stops though they are not special."""
        from tokenizers import Tokenizer

        self._text = tokenizer
        self._backend = Tokenizer.from_str(tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        added = self._backend.get_added_tokens_decoder()
        self.added: dict[str, int] = {t.content: i for i, t in added.items()}
        special = {i: t for i, t in added.items() if t.special or t.content in ends}
        self.special: dict[str, int] = {t.content: i for i, t in special.items()}
        self.swallows_right = frozenset(t.content for t in special.values() if t.rstrip)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_re = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        n_ids = max([self._backend.get_vocab_size(with_added_tokens=True) - 1, *special]) + 1
        self.is_special = np.zeros(n_ids, bool)
        self.is_special[list(special)] = True
        self._words = WordCache.of(self._backend)
        self._tails: dict[tuple[str, bool, bool], list[int]] = {}
        # A SentencePiece-like tokenizer writes a space before the first word of whatever it is given.
        line, letter = self.plain("\n"), self.plain("a")
        self.prepends = self.plain("\na")[len(line) :] != letter

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer itself puts in front of a text, as a BOS."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        ids = self._backend.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return tuple(ids[: next(starts, 0)])

    def knows(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) which ids are in the vocabulary."""
        known = self._known
        return np.array([0 <= i < len(known) and known[i] for i in ids.tolist()], bool)

    @functools.cached_property
    def _known(self) -> NDArray[np.bool_]:
        ids = list(self._backend.get_vocab(with_added_tokens=True).values())
        known = np.zeros(max(ids, default=-1) + 1, bool)
        known[ids] = True
        return known

    def plain(self, text: str) -> list[int]:
        """Ids as the tokenizer gives them, special-token strings included."""
        if self._words is not None:
            return self._words.encode(text)
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def with_twin(self, pieces: list[Piece]) -> list[int]:
        """Ids from a twin of the tokenizer whose special tokens carry other names, so that their usual names in
        content are plain text while everything else (splitting, merging, prefix spaces) stays as it is."""
        twin, back = self._twin
        text = "".join(f"{TWIN_OPEN}{t}{TWIN_CLOSE}" if kind == "special" else t for kind, t in pieces)
        return [back.get(i, i) for i in twin.encode_batch_fast([text], add_special_tokens=False)[0].ids]

    @functools.cached_property
    def _twin(self) -> tuple[Any, dict[int, int]]:
        """The twin, and which id of it stands for which of ours."""
        from tokenizers import Tokenizer

        data = json.loads(self._text)
        renamed = [
            {**t, "content": f"{TWIN_OPEN}{t['content']}{TWIN_CLOSE}"} if t["content"] in self.special else t
            for t in data["added_tokens"]
        ]
        plain = {**data, "added_tokens": renamed, "post_processor": None, "padding": None, "truncation": None}
        twin: Any = Tokenizer.from_str(json.dumps(plain))
        both = zip(renamed, data["added_tokens"], strict=True)
        back = {twin.token_to_id(new["content"]): original["id"] for new, original in both}
        assert None not in back, renamed
        return twin, back

    def literals(self, text: str) -> list[Literal]:
        """Every special token in the text: the template's, where no content holds look-alikes."""
        return [(m.start(), m.end(), m.group()) for m in self.special_re.finditer(text)]

    def encode(self, text: str, literals: list[Literal], boundaries: list[int], place: str) -> Encoded:
        """Ids of the text. Where a token would straddle a boundary between prompt and reply (characters, ascending),
        so that the prompt alone would encode otherwise, the two sides are encoded separately."""
        rest = self._encode(text, literals, 0, place)
        done: list[_Part] = []
        offset = start = 0  # tokens done, the character at which `rest` begins
        ends = [end for _, end, _ in literals]
        cuts: list[int] = []
        for boundary in boundaries:
            n = self._prompt_length(text, literals, ends, start, boundary, rest)
            if n is None:
                left = self._encode(text[:boundary], [x for x in literals if x[1] <= boundary], start, place)
                done.append(left)
                offset += len(left.ids)
                start, n = boundary, 0
                rest = self._encode(text, literals, start, place)
            cuts.append(offset + n)
        if not done:
            return Encoded(rest.array, rest.special, tuple(cuts), 0)
        ids = np.concatenate([*(part.array for part in done), rest.array])
        return Encoded(ids, np.flatnonzero(self.is_special[ids]), tuple(cuts), len(done))

    def _encode(self, text: str, literals: list[Literal], start: int, place: str) -> _Part:
        """text[start:], where exactly the literals are special."""
        mine = [(s - start, e - start, t) for s, e, t in literals if s >= start] if start else literals
        text = text[start:] if start else text
        wanted = [self.special[t] for _, _, t in mine]
        part = self._part(self._plain(text, start > 0))
        if part.array[part.special].tolist() != wanted:
            part = self._part(self.with_twin(pieces_of(text, mine)))
        if part.array[part.special].tolist() != wanted:
            raise MaskError(
                place,
                f"{len(part.special)} control ids where the template wrote {len(wanted)}",
                "the tokenizer turns content into control ids; remove the control-token strings from the row",
            )
        return part

    def _part(self, ids: list[int]) -> _Part:
        array = np.array(ids, np.int64)
        return _Part(ids, array, self.is_special[array].nonzero()[0])

    def _plain(self, text: str, continues: bool) -> list[int]:
        """Ids of the text; of one that continues another, without the space that some tokenizers write in front."""
        for before in ("\n", "\0") if continues and self.prepends else ():  # a text may merge with a line's end
            anchor = self.plain(before)
            ids = self.plain(before + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.plain(text)

    def _prompt_length(
        self, text: str, literals: list[Literal], ends: list[int], start: int, boundary: int, part: _Part
    ) -> int | None:
        """How many ids of `part` (text[start:]) are the prompt text[start:boundary], encoded alone; None where
        its ids are not a prefix of them."""
        last = bisect.bisect_right(ends, boundary) - 1  # the last control token before the boundary
        base, left = 0, start
        if last >= 0 and literals[last][0] >= start:
            base = int(part.special[last - bisect.bisect_left(literals, (start, start, ""))])
            left = literals[last][0]
            swallowed = literals[last][2] in self.swallows_right and not text[ends[last] : boundary].strip()
            if swallowed and text[boundary : boundary + 1].isspace():
                return None  # the control token takes the reply's leading spaces with it
            if ends[last] == boundary:
                return base + 1
        if boundary >= len(text):
            return len(part.ids)
        mine = literals[last : last + 1] if last >= 0 and literals[last][0] >= start else []
        key = (text[left:boundary], bool(mine), left > 0)  # mostly a generation prompt: the same in every row
        if key not in self._tails:
            if len(self._tails) > 4096:
                self._tails.clear()
            self._tails[key] = self._encode(text[:boundary], mine, left, "prompt").ids
        prompt = self._tails[key]
        n = base + len(prompt)
        return n if part.ids[base:n] == prompt else None

    @functools.cached_property
    def fewest_tokens(self) -> FewestTokens:
        return FewestTokens(self._text)

    def rough_length(self, text: str) -> tuple[int, int]:
        """About how many ids the text has, special-token strings being one each; and how many of them are those."""
        ids = self.plain(text)
        return len(ids), int(self.is_special[ids].sum())

    def round_trip(self, text: str) -> str:
        """The text encoded and decoded again."""
        return self.decode(self.plain(text))

    def encode_pieces(self, pieces: list[Piece]) -> list[int]:
        """Ids of (kind, text) pieces, kind "special" or "content"."""
        if any(kind == "content" and self.special_re.search(text) for kind, text in pieces):
            return self.with_twin(pieces)
        return self.plain("".join(t for _, t in pieces))


encoder_of = functools.lru_cache(maxsize=8)(Encoder)
"""one Encoder for all that have the same tokenizer.json: loading a large one takes a second"""
