"""A row's text held against its shape: which control tokens are the template's own, and which of them ends which reply.

What cannot be proven is refused with MaskError.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftflow.chat.encode import Encoded, Encoder, Literal, pieces_of
from sftflow.chat.proof.marks import MarkedRow, Span
from sftflow.chat.proof.shape import End, Shape
from sftflow.chat.schema import parse_row
from sftflow.chat.template import Row, Template
from sftflow.foundation.errors import FormatError, MaskError

UNASKED = ("nothing prompts for this reply: it is the first message", "remove it, or give it weight 0")
_EXCHANGE: list[dict[str, Any]] = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]

# What a prompt may end with and no reply begin with: an opened and closed block, as `<think>\n\n</think>\n\n`.
_CLOSED = re.compile(r"\s*(<[^<>\s]{1,40}>)[^<>]*(?!\1)(<[^<>\s]{1,40}>)\s*")
# In these its two tokens may differ. Two that differ in more may both be opened, and neither closed.
_SIDES = re.compile(r"start|begin|open|prefix|end|close|suffix|[\W_]")


@dataclass(frozen=True, slots=True)
class Proof:
    """The row's text is its shape's skeleton with the row's values in it.

    spans: of each value in the text, in the order of the skeleton.   starts: where each piece of the skeleton begins.
    literals: the control tokens that the template itself wrote.
    """

    row: Row
    text: str
    shape: Shape
    spans: list[Span]
    starts: list[int]
    literals: list[Literal]


class Prover:
    """Proves where in the renderings of one format the values stand and the replies end.

    end_token: the token at which ordinary replies stop, or None.
    stop_ids: ids at which a reply ends: the ends of turns that the template writes, and those given.
    ends: ids of each end of a turn, the longest first; most are one token, others more (`<|END_RESPONSE|>` in front of
    `<|END_OF_TURN_TOKEN|>`), whose last one stops generation.
    """

    def __init__(self, template: Template, encoder: Encoder, stops: Sequence[int]) -> None:
        """stops: ids at which generation stops, whatever the template writes."""
        self._template, self._encoder = template, encoder
        self._stops = [token for token, i in encoder.special.items() if i in stops]
        self._shapes: dict[Any, Shape] = {}
        self._complete: set[Any] = set()  # shapes of conversations whose prompt leaves nothing out
        end = template.format.end
        self.end_token = end if end in encoder.special else None
        ends = self._probe_ends()
        written = [encoder.special[token] for token in (self.end_token, *(e.token for e in ends)) if token]
        self.stop_ids = list(dict.fromkeys([*written, *stops]))
        ids = {tuple(encoder.encode_pieces(pieces_of(e.text, encoder.literals(e.text)))) for e in ends}
        self.ends = sorted(ids | {(i,) for i in self.stop_ids}, key=len, reverse=True)

    def prove(self, row: Row, text: str) -> Proof:
        """Raises MaskError where the text is not the template's words with the row's values in them, or where it
        lacks a value."""
        name = self._template.format.name
        for words in (False, True):
            found = self._shape(row, words=words)
            if found is None:
                continue
            shape, values, required = found
            spans = shape.skeleton.find(values, text)
            if spans is None:
                continue
            for mark in shape.left_out:
                if required[mark]:
                    place = f"{row.source}.{shape.placeholders[mark].where}"
                    fact = f"the {name} format leaves it out of the training text"
                    raise MaskError(place, fact, "remove it from the row or use a format that writes it")
            starts = [0, *(end for _, end in spans)]
            return Proof(row, text, shape, spans, starts, shape.literals(starts))
        fact = f"the {name} format changes the contents, so it cannot be proven that none is left out"
        raise MaskError(row.source, fact, "use another format")

    def behind(self, proof: Proof, prompt: str) -> Proof | None:
        """The same row with its last reply behind all of the prompt; None where that does not go on, where the reply's
        first word is, with an opened and closed block."""
        own = proof.shape.marks_of.get(len(proof.row.messages) - 1)
        if not own:
            return None
        at = proof.spans[own[0]][0]
        block, n, first = prompt[at:], len(prompt) - at, own[0]
        closed, written = _CLOSED.fullmatch(block), self._encoder.literals(block)
        if not closed or prompt[:at] != proof.text[:at]:
            return None
        stops = any(self._encoder.special[token] in self.stop_ids for _, _, token in written)
        opening, closing = closed.groups()
        if _SIDES.sub("", opening.lower()) != _SIDES.sub("", closing.lower()):
            return None
        outside, opened, _ = proof.text[at:].partition(opening)
        if stops or closing in outside or (opened and not outside.strip()):  # the reply has thoughts of its own
            return None
        literals = [x for x in proof.literals if x[0] < at]
        literals += [(at + start, at + end, token) for start, end, token in written]
        literals += [(start + n, end + n, token) for start, end, token in proof.literals if start >= at]
        spans = [*proof.spans[:first], *((left + n, right + n) for left, right in proof.spans[first:])]
        starts = [*proof.starts[: first + 1], *(start + n for start in proof.starts[first + 1 :])]
        text = prompt + proof.text[at:]
        return replace(proof, text=text, spans=spans, starts=starts, literals=literals)

    def _shape(self, row: Row, *, words: bool) -> tuple[Shape, list[str], list[bool]] | None:
        """(the row's shape, its values, whether each may not be left out); None where the template refuses marks.

        Shapes of whole contents are remembered, so that the usual row needs no marks once its shape is known.
        """
        key: Any = None if words else row.shape_key
        if key in self._shapes:
            shape = self._shapes[key]
            return shape, row.texts, [p.required for p in shape.placeholders]
        marked = MarkedRow(row, words=words)
        if not words and key is None:
            key = json.dumps([marked.messages, marked.tools])
        known = self._shapes.get(key)
        if known is None:
            try:
                known = Shape(self._template, self._encoder.special_re, marked, self.end_token, self._stops)
            except FormatError:
                return None
            if key is not None:
                if len(self._shapes) > 10_000:
                    self._shapes.clear()
                self._shapes[key] = known
        return known, marked.values, [p.required for p in marked.placeholders]

    def literals(self, row: Row, text: str, add_generation_prompt: bool) -> list[Literal]:
        """The control tokens that the template wrote, in a text without supervised turns."""
        if not row.conversation.mentions(self._encoder.special_re):
            return self._encoder.literals(text)
        for words in (False, True):
            marked = MarkedRow(row, words=words)
            try:
                rendering = self._template.text(marked.messages, marked.tools, add_generation_prompt, row.source)
            except FormatError:
                continue
            skeleton = marked.skeleton(rendering)
            spans = skeleton.find(marked.values, text)
            if spans is not None:
                starts = [0, *(end for _, end in spans)]
                return [
                    (start + left, start + right, token)
                    for start, piece in zip(starts, skeleton.pieces, strict=True)
                    for left, right, token in self._encoder.literals(piece)
                ]
        fact = "content holds control-token strings and the template changes its text by them"
        raise MaskError(row.source, fact, "remove those strings from the row")

    def missing_from_prompt(self, row: Row) -> list[str]:
        """Places of the row that the prompt for the next reply does not hold: see Renderer.missing_from_prompt."""
        key = row.shape_key
        if key in self._complete:
            return []
        marked = MarkedRow(row, words=False)
        try:
            text = self._template.text(marked.messages, marked.tools, True, row.source)
        except FormatError:
            return []  # it looks into contents; `render` says what it refuses
        written = set(marked.skeleton(text).order)
        missing = [
            p.where
            for number, p in enumerate(marked.placeholders)
            if p.required
            and number not in written
            and (p.message < 0 or row.messages[p.message]["role"] != "assistant" or "tool_calls" in p.where)
        ]
        if key is not None and not missing:
            if len(self._complete) > 1_000:
                self._complete.clear()
            self._complete.add(key)
        return missing

    # ---- replies

    def end_of_turn(self, proof: Proof, turn: int, start: int) -> int:
        """The number of the last literal of assistant turn `turn`, whose reply begins at character `start`; after
        proving that the reply holds all the turn's values, and nothing of another message."""
        place, shape, literals = f"{proof.row.source}.messages[{turn}]", proof.shape, proof.literals
        end = shape.end_of(turn)
        if isinstance(end, str):
            raise MaskError(place, end, "use another format, or append_eos: true where the format writes no end")
        if self._encoder.special[end.token] not in self.stop_ids:
            fact = f"this reply ends with {end.token}, at which generation would not stop"
            raise MaskError(place, fact, "use another format, or add it to eos_token_id")
        first, at = proof.starts[end.piece] + end.start, proof.starts[end.piece] + end.last
        own = shape.marks_of.get(turn, [])
        # (The beginning of a content may be what the template pre-fills, as `<think>`: then it is in the prompt.)
        if not all(start < proof.spans[n][1] <= first for n in own):
            fact = "its content does not lie between its prompt and its end-of-turn token"
            raise MaskError(place, fact, "use another format")
        within = range(
            bisect.bisect_right(proof.spans, start, key=lambda span: span[1]),
            bisect.bisect_left(proof.spans, at, key=lambda span: span[0]),
        )
        if any(shape.placeholders[shape.skeleton.order[n]].message != turn for n in within):
            raise MaskError(place, "another message's content lies inside this reply", "use another format")
        inside = range(bisect.bisect_left(literals, (start,)), bisect.bisect_left(literals, (at + 1,)))
        if at < start or not inside or literals[inside[-1]][0] != at:
            raise MaskError(place, "its end-of-turn token does not follow its prompt", "use another format")
        early = [literals[n][2] for n in inside[:-1] if self._encoder.special[literals[n][2]] in self.stop_ids]
        if early:
            remedy = f"use another format{', or take it out of eos_token_id' if early[0] in self._stops else ''}"
            raise MaskError(
                place, f"the format writes {early[0]} inside the reply, where generation would stop", remedy
            )
        # Many templates write no header unasked where there is no message: what looks like a first reply would then
        # begin with its own header.
        if turn == 0 and (not own or proof.text[start : proof.spans[own[0]][0]].strip()):
            raise MaskError(place, *UNASKED)
        return inside[-1]

    def calculator_results(self, proof: Proof, start: int, last: int) -> Iterator[tuple[int, int]]:
        """(first literal, last literal) around each result that the calculator wrote into the reply that begins at
        character `start` and ends with literal `last`: it is read, not produced."""
        if self._template.python is None:
            return
        _, _, opening, closing = self._template.python
        opened: int | None = None
        for number in range(bisect.bisect_left(proof.literals, (start,)), last):
            token = proof.literals[number][2]
            if token == opening and opened is None:
                opened = number
            elif token == closing and opened is not None:
                yield opened, number
                opened = None

    def turns(self, proof: Proof, encoded: Encoded) -> tuple[tuple[int, str], ...]:
        """(first token, role) of each message, for looking at the row; of one that is written inside the next, as a
        system message in the first user turn, both roles together."""
        out: list[tuple[int, str]] = []
        literals = proof.literals
        places = [proof.starts[piece] + offset for piece, offset in proof.shape.turn_starts]
        own: dict[int, int] = {}
        for mark, (left, _) in zip(proof.shape.skeleton.order, proof.spans, strict=True):
            own.setdefault(proof.shape.placeholders[mark].message, left)
        waiting = ""
        for turn, (message, at) in enumerate(zip(proof.row.messages, places, strict=True)):
            if turn + 1 < len(places) and own.get(turn, -1) >= places[turn + 1]:
                waiting += f"{message['role']}+"
                continue
            number = bisect.bisect_left(literals, (at,))
            if not out:
                token = 0
            elif number < len(literals) and literals[number][0] == at:
                token = int(encoded.literals[number])
            else:  # a header without control tokens: close enough for the eye
                before = [(0, e - s, t) for s, e, t in literals[max(0, number - 1) : number]]
                left = literals[number - 1][0] if number else 0
                token = int(encoded.literals[number - 1]) if number else 0
                token += len(self._encoder.encode_pieces(pieces_of(proof.text[left:at], before)))
            out.append((max(token, out[-1][0] if out else 0), waiting + message["role"]))
            waiting = ""
        return tuple(out)

    def _probe_ends(self) -> list[End]:
        """The ends of turns: of an ordinary reply, and of a reply that calls a tool where the format has that."""
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}, "id": "probe0000"}
        parameters = {"type": "object", "properties": {"at": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": parameters}}
        calls = [_EXCHANGE[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        probes = [
            {"messages": _EXCHANGE},
            {"messages": _EXCHANGE, "tools": [tool]},
            {"messages": calls, "tools": [tool]},
        ]
        ends: list[End] = []
        for probe in probes:
            found = self._shape(self._template.row(parse_row(probe, "probe")), words=False)
            if found is None or any(found[0].placeholders[mark].message == 1 for mark in found[0].left_out):
                continue
            end = found[0].end_of(1)
            if isinstance(end, End):
                self.end_token = self.end_token or end.token
                ends.append(end)
        return ends


def unflagged_ends(template: Template, encoder: Encoder, stops: Sequence[int]) -> tuple[str, ...]:
    """Tokens that end turns though the tokenizer does not mark them special: those of `stops`, and those of the added
    tokens that the template writes directly behind an ordinary reply.

    encoder: one that knows no ends."""
    unflagged = {token: i for token, i in encoder.added.items() if token not in encoder.special}
    ends = {token for token, i in unflagged.items() if i in stops}
    written = re.compile("|".join(map(re.escape, sorted(encoder.added, key=len, reverse=True))))
    marked = MarkedRow(template.row(parse_row(_EXCHANGE, "probe")), words=False)
    with contextlib.suppress(FormatError):
        rendering = template.text(marked.messages, (), False, "probe") if unflagged else ""
        behind = marked.skeleton(rendering).pieces[-1].lstrip()
        while rendering and (m := written.match(behind)):
            ends |= {m.group()} & unflagged.keys()
            behind = behind[m.end() :]
    return tuple(sorted(ends))
