"""What rows have in common that differ in their values only, learnt by rendering marks once: the template's words, and
where in them replies end and turns begin."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sftflow.chat.beginnings import Beginnings
from sftflow.chat.encode import Literal
from sftflow.chat.proof.marks import MarkedRow
from sftflow.chat.template import Template
from sftflow.foundation.errors import FormatError
from sftflow.foundation.sequences import common_prefix

_ASKS = {"role": "user", "content": "zqasks"}


@dataclass(frozen=True, slots=True)
class End:
    """What ends a turn, mostly one control token: in piece `piece` of the skeleton, from character `start` of it.

    text: all of it, control tokens and what stands between them.   token: the last one, at which generation stops.
    last: where that begins in the piece.
    """

    piece: int
    start: int
    last: int
    text: str
    token: str


class Shape:
    """The skeleton of all rows with the same roles and fields, and where in it replies end and turns begin.

    left_out: the marks that the template does not write.   marks_of: of each message, where its marks stand in the
    skeleton's order.
    """

    def __init__(
        self,
        template: Template,
        special_re: re.Pattern[str],
        marked: MarkedRow,
        plain_end: str | None,
        stops: Collection[str],
    ) -> None:
        """plain_end: the token that ends ordinary replies, where it is known.   stops: tokens at which generation
        stops wherever they come. Raises FormatError where the template refuses the marks."""
        self._template, self._special_re, self._marked = template, special_re, marked
        self._plain_end, self._stops = plain_end, {*stops, plain_end}
        self._beginnings = Beginnings(template, marked.messages, marked.tools)
        self.placeholders, self.text = marked.placeholders, ""
        self.text = self._render(len(marked.messages))
        self.skeleton = marked.skeleton(self.text)
        self.left_out = sorted(set(range(len(self.placeholders))) - set(self.skeleton.order))
        self.marks_of: dict[int, list[int]] = {}
        for number, mark in enumerate(self.skeleton.order):
            self.marks_of.setdefault(self.placeholders[mark].message, []).append(number)
        self._literals = [
            (number, m.start(), m.end(), m.group())
            for number, piece in enumerate(self.skeleton.pieces)
            for m in special_re.finditer(piece)
        ]
        self._ends: dict[int, End | str] = {}

    def _render(self, n: int, *, add_generation_prompt: bool = False) -> str:
        """The first n messages, with marks."""
        if n == len(self._marked.messages) and not add_generation_prompt and self.text:
            return self.text
        return self._beginnings.text(n, add_generation_prompt, "marked row")

    def literals(self, piece_starts: list[int]) -> list[Literal]:
        """The control tokens that the template wrote, at their places in a row's text."""
        return [(piece_starts[p] + s, piece_starts[p] + e, token) for p, s, e, token in self._literals]

    def end_of(self, turn: int) -> End | str:
        """What ends assistant turn number `turn`, or why that cannot be said."""
        if turn not in self._ends:
            try:
                self._ends[turn] = self._find_end(turn)
            except FormatError as error:
                self._ends[turn] = f"it cannot be proven where this reply ends ({error.fact})"
        return self._ends[turn]

    def _find_end(self, turn: int) -> End | str:
        """The first control token after the turn's last word, and what belongs to it; behind a call, the one that
        ends ordinary replies, for others may close the call. The template must write it there, too, when the
        conversation stops with this turn: then it belongs to this turn and is not the next one's header."""
        message, name = self._marked.messages[turn], self._template.format.name
        no_end = f"the {name} format writes no end-of-turn token after this reply: it could not learn to stop"
        prompt, alone = self._render(turn, add_generation_prompt=True), self._render(turn + 1)
        own = self.marks_of.get(turn, [])
        if own:  # all that leads to the turn's last word must be the same whether or not other turns follow
            piece, offset = own[-1] + 1, 0
            upto = self.skeleton.starts[piece]
            alike = alone[:upto] == self.text[:upto]
            after = self._marked.skeleton(alone[upto:]).pieces[0]
        elif self.text.startswith(prompt) and alone.startswith(prompt):  # an empty reply
            piece, offset = self._place(len(prompt))
            alike, after = True, alone[len(prompt) :]
        else:
            return f"the {name} format's prompt for this reply depends on the contents"
        if not alike:
            return f"the {name} format writes this reply in another way when other turns follow"
        calls = bool(message.get("tool_calls")) or not isinstance(message["content"], str)
        here, there = (list(self._special_re.finditer(*x)) for x in ((self.skeleton.pieces[piece], offset), (after, 0)))
        both = [(a, b) for a, b in zip(here, there, strict=False) if a.group() == b.group()]
        if not both or both[0] != (here[0], there[0]):
            return no_end
        found, found_alone = both[0]
        if calls or not own:  # the first may close a call, or belong to the header of an empty reply
            ordinary = [pair for pair in both if pair[0].group() == self._plain_end]
            if not ordinary and not own:
                return no_end
            found, found_alone = ordinary[0] if ordinary else both[-1]
        between = self.skeleton.pieces[piece][offset : found.start()]
        if between != after[: found_alone.start()]:
            return f"the {name} format ends this reply in another way when other turns follow"
        if own and between.strip() and not calls and not self._closes_thoughts(turn, own[-1], between, found.group()):
            return f"the {name} format ends this reply with {between.strip()!r}, which is no token of this tokenizer"
        plain = bool(own) and not calls
        unasked = self._opens_reply(turn, prompt, after)
        closing = self._closing(turn, own[-1]) if unasked and plain else None
        if unasked and not (
            self._special_re.search(closing) if closing is not None else found.group() == self._plain_end
        ):
            return no_end
        text = self._whole_end(turn, found, found_alone, own[-1], closing) if plain else found.group()
        stop = list(self._special_re.finditer(text))[-1]
        return End(piece, found.start(), found.start() + stop.start(), text, stop.group())

    def _whole_end(
        self, turn: int, here: re.Match[str], alone: re.Match[str], last_word: int, closing: str | None
    ) -> str:
        """A reply's end, from its first control token to that at which generation stops.

        It is what the template writes alike here, when the conversation stops with this turn, and when the user speaks
        next: as far as the first token in it that is known to stop generation, else its last control token. If more
        than control tokens follow that when the conversation stops, the first token is the end.
        closing: what of it is no header, where the template opens the next reply unasked.
        """
        first = here.group()
        if first in self._stops:
            return first
        followed = self._followed(turn, last_word)
        found = self._special_re.search(followed)
        if found is None:
            return first
        texts = [m.string[m.start() :] for m in (here, alone, found)]
        same = min(common_prefix(texts[0], text) for text in texts)
        tokens = [m for m in self._special_re.finditer(texts[0]) if m.end() <= same]
        known = [m for m in tokens if m.group() in self._stops]
        if closing is not None:
            tokens = [m for m in tokens if m.end() <= len(closing) - found.start()]
        elif tokens and self._special_re.sub("", texts[1][tokens[-1].end() :]).strip():
            tokens = []
        return texts[0][: (known or tokens[-1:])[0].end()] if known or tokens else first

    def _closes_thoughts(self, turn: int, last_word: int, between: str, end: str) -> bool:
        """Whether a reply of thoughts alone stops behind what closes them: the content's own tag, or what the template
        writes between thoughts and a content."""
        message = self._marked.messages[turn]
        if message["content"].strip():
            closes = self._marked.skeleton(message["content"]).pieces[-1]
        else:
            said = [*self._marked.messages[:turn], {**message, "content": _ASKS["content"]}]
            closes = self._behind_word(last_word, said)
        return end in self._stops and between.strip() == closes.strip()

    def _followed(self, turn: int, last_word: int) -> str:
        """What stands between a turn's last word and what a user says next; "" where the format lets none speak."""
        return self._behind_word(last_word, [*self._marked.messages[: turn + 1], _ASKS])

    def _behind_word(self, last_word: int, messages: list[dict[str, Any]]) -> str:
        """What the template writes between a mark and the content of `_ASKS`, which is one of the messages' or none."""
        try:
            asks = self._marked.skeleton(self._template.text(messages, self._marked.tools, False, "marked row"))
        except FormatError:
            return ""
        mark = self.skeleton.order[last_word]
        behind = [piece for m, piece in zip(asks.order, asks.pieces[1:], strict=True) if m == mark]
        return behind[-1].partition(_ASKS["content"])[0] if behind else ""

    def _closing(self, turn: int, last_word: int) -> str:
        """What a turn ends with before the user's header, which is what a conversation begins with, too."""
        followed = self._followed(turn, last_word)
        begins = self._template.text([_ASKS], self._marked.tools, False, "marked row").partition(_ASKS["content"])[0]
        return followed[: len(followed) - common_prefix(followed[::-1], begins[::-1])]

    def _opens_reply(self, turn: int, prompt: str, after: str) -> bool:
        """Whether what follows the turn is the next reply's header, which the template writes unasked."""
        if self._marked.messages[turn - 1]["role"] == "assistant":
            return False  # what the prompt ends with is the end of the reply before
        near = prompt[max(0, len(prompt) - len(after)) :]  # what lies further in front cannot follow the turn
        header = [m.start() for m in self._special_re.finditer(near)]
        if not header or not after.endswith(near[header[-1] :]):
            return False
        return self._render(turn) == prompt

    @functools.cached_property
    def turn_starts(self) -> list[tuple[int, int]]:
        """Where each message begins, as (piece, character in it): where the text leaves that of the messages before. A
        last message may be written otherwise from its first word on (Qwen3 puts an empty block of thoughts in front):
        then behind the end of the message before."""
        places = [0]
        for n in range(1, len(self._marked.messages)):
            try:
                before = self._render(n)
            except FormatError:
                before = ""
            places.append(max(places[-1], common_prefix(before, self.text), self._behind(n - 1)))
        return [self._place(p) for p in places]

    def _behind(self, turn: int) -> int:
        """Where the end of a turn and the blanks behind it are over in the marked text; 0 where it has no end."""
        own = self.marks_of.get(turn, [])
        piece = self.skeleton.pieces[own[-1] + 1] if own else ""
        ends = [m.end() for m in self._special_re.finditer(piece) if m.group() in self._stops]
        if not ends:
            return 0
        return self.skeleton.starts[own[-1] + 1] + ends[0] + len(piece[ends[0] :]) - len(piece[ends[0] :].lstrip())

    def _place(self, position: int) -> tuple[int, int]:
        """(piece, character in it) of a position in the marked text; inside a mark, the end of the piece before."""
        piece = bisect.bisect_right(self.skeleton.starts, position) - 1
        return piece, min(position - self.skeleton.starts[piece], len(self.skeleton.pieces[piece]))
