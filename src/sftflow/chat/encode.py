"""Text -> ids, with the characters each id covers.

    "B U hi /U"  ->  B  U  hi  /U
                     where the template wrote B, U and /U they are special tokens (literals);
                     where the content did (look-alikes) they stay text.

To tell the two apart, the caller renders again with each look-alike hidden behind a mark (`Encoder.hide`); what is
special then is the template's (`Encoder.literals_behind`).
"""

from __future__ import annotations

import bisect
import copy
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from sftflow.chat.format import tokenizer_json
from sftflow.errors import MaskError

Literal = tuple[int, int, str]  # (start, end, token): a special token the template itself wrote
Piece = tuple[str, str]  # ("special", token) or ("content", text)

MARK_OPEN, MARK_CLOSE = "\uf8f0", "\uf8f1"  # private-use characters: stand for content while literals are told apart
MARK_PATTERN = f"{MARK_OPEN}(\\d+){MARK_CLOSE}"


def mark(what: int | str) -> str:
    return f"{MARK_OPEN}{what}{MARK_CLOSE}"


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids with the character span [begin, end) of each.
    splits: boundaries that a token would have straddled, encoded on both sides separately."""

    ids: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    splits: int = 0

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(self.ids + other.ids, self.begin + other.begin, self.end + other.end)

    def shifted(self, by: int) -> Encoded:
        if not by:
            return self
        return Encoded(self.ids, [b + by for b in self.begin], [e + by for e in self.end])


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
    """Encodes with one tokenizer, but lets only literals become special tokens.

    >>> encoder = Encoder(tokenizer)
    >>> encoder.encode(text, encoder.literals(text), [reply_start], "data.jsonl:17").ids
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self._json = tokenizer_json(tokenizer)
        self._json["post_processor"] = None  # it would add a BOS, and (byte-level) shorten offsets by leading spaces
        self._backend = Tokenizer.from_str(json.dumps(self._json))
        self._twin: tuple[Any, dict[int, int]] | None = None
        self.special: dict[str, int] = {t["content"]: t["id"] for t in self._json["added_tokens"] if t["special"]}
        self._special_ids = frozenset(self.special.values())
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_re = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    # ---- which special tokens are the template's

    def literals(self, text: str) -> list[Literal]:
        """Every special token in the text: the template's, where no content holds look-alikes."""
        return [(m.start(), m.end(), m.group()) for m in self.special_re.finditer(text)]

    def hide(self, value: Any, found: list[str], place: str) -> Any:
        """Messages or tools with each look-alike in them appended to `found` and replaced by the mark of its number."""
        if isinstance(value, str):
            if MARK_OPEN in value or MARK_CLOSE in value:
                raise MaskError(place, "control-token strings beside private-use characters", "")

            def replace_one(m: re.Match[str]) -> str:
                found.append(m.group())
                return mark(len(found) - 1)

            return self.special_re.sub(replace_one, value)
        if isinstance(value, dict):
            return {
                self.hide(k, found, place): v if k in ("role", "type") else self.hide(v, found, place)
                for k, v in value.items()
            }
        return [self.hide(v, found, place) for v in value] if isinstance(value, list) else value

    def literals_behind(self, hidden: str, found: list[str], text: str, place: str) -> list[Literal]:
        """The special tokens in `hidden`, at their positions in `text`, which is `hidden` with each mark replaced by
        the look-alike it stands for."""
        out: list[Literal] = []
        shift = at = 0
        rebuilt = []
        pattern = re.compile(f"{MARK_PATTERN}|{self.special_re.pattern}")
        for m in pattern.finditer(hidden):
            rebuilt.append(hidden[at : m.start()])
            at = m.end()
            if m.group(1) is None:
                out.append((m.start() + shift, m.end() + shift, m.group()))
                rebuilt.append(m.group())
            else:
                original = found[int(m.group(1))]
                shift += len(original) - (m.end() - m.start())
                rebuilt.append(original)
        rebuilt.append(hidden[at:])
        if "".join(rebuilt) != text:
            raise MaskError(
                place,
                "content holds control-token strings and the template changes its text by them",
                "remove those strings from the row",
            )
        return out

    # ---- ids

    def encode(self, text: str, literals: list[Literal], boundaries: list[int], place: str) -> Encoded:
        """Ids of the text with their character offsets. Where a token would straddle a boundary between prompt and
        reply, or the prompt alone would encode otherwise, the two sides are encoded separately."""

        def encode(left: int, right: int) -> Encoded:
            inside = [(s - left, e - left, t) for s, e, t in literals if left <= s and e <= right]
            return self.encode_pieces(pieces_of(text[left:right], inside)).shifted(left)

        done, start, splits = Encoded(), 0, 0
        rest = encode(0, len(text))
        literal_ends = {end for _, end, _ in literals}
        for boundary in boundaries:
            if boundary in literal_ends or boundary >= len(text):
                continue  # a special token ends here (or the text does): nothing can straddle
            left = encode(start, boundary)
            n = len(left.ids)
            if rest.ids[:n] == left.ids and (n == len(rest.ids) or rest.begin[n] >= boundary):
                continue
            done, start, splits = done + left, boundary, splits + 1
            rest = encode(boundary, len(text))
        whole = replace(done + rest, splits=splits)
        n_special = sum(i in self._special_ids for i in whole.ids)
        if n_special != len(literals):
            raise MaskError(
                place,
                f"{n_special} control ids where the template wrote {len(literals)}",
                "the tokenizer turns content into control ids; remove the control-token strings from the row",
            )
        return whole

    def encode_pieces(self, pieces: list[Piece]) -> Encoded:
        """Encode (kind, text) pieces, kind "special" or "content", to ids and their character offsets."""
        if any(kind == "content" and self.special_re.search(text) for kind, text in pieces):
            return self._encode_with_twin(pieces)
        encoding = self._backend.encode("".join(t for _, t in pieces), add_special_tokens=False)
        return Encoded(encoding.ids, [o[0] for o in encoding.offsets], [o[1] for o in encoding.offsets])

    def _encode_with_twin(self, pieces: list[Piece]) -> Encoded:
        """Encode with a twin of the tokenizer whose special tokens carry other names, so that their usual names in
        content are plain text while everything else (splitting, merging, prefix spaces) stays as it is."""
        twin, back = self._make_twin()
        parts, real_at, alias_at = [], [0], [0]
        for kind, text in pieces:
            written = mark(text) if kind == "special" else text
            parts.append(written)
            real_at.append(real_at[-1] + len(text))
            alias_at.append(alias_at[-1] + len(written))
        encoding = twin.encode("".join(parts), add_special_tokens=False)

        def real(position: int, right: bool) -> int:
            i = (bisect.bisect_left if right else bisect.bisect_right)(alias_at, position) - 1
            i = max(0, min(i, len(pieces) - 1))
            inside = position - alias_at[i]
            if pieces[i][0] == "special":
                inside = min(inside, len(pieces[i][1])) if inside < len(parts[i]) else len(pieces[i][1])
            return real_at[i] + inside

        ids = [back.get(i, i) for i in encoding.ids]
        begin = [real(s, False) for s, _ in encoding.offsets]
        return Encoded(ids, begin, [real(e, True) for _, e in encoding.offsets])

    def _make_twin(self) -> tuple[Any, dict[int, int]]:
        """The twin, and which id of it stands for which of ours; made when first needed."""
        from tokenizers import Tokenizer

        if self._twin is None:
            data = copy.deepcopy(self._json)
            for token in data["added_tokens"]:
                if token["special"]:
                    token["content"] = mark(token["content"])
            twin = Tokenizer.from_str(json.dumps(data))
            back: dict[int, int] = {}
            for renamed, original in zip(data["added_tokens"], self._json["added_tokens"], strict=True):
                new_id = twin.token_to_id(renamed["content"])
                assert new_id is not None, renamed
                back[new_id] = original["id"]
            self._twin = (twin, back)
        return self._twin
