"""What a reply's thoughts stand between, learnt from the format's own template, and how they are told from its words.

    <think>\\nhm\\n</think>\\n\\nIt is noon.                                       tags, which are text
    <|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is noon.    control tokens

A reply's text does not have control tokens. Those that stand around thoughts are shown in it where that is asked for
(`GenerationRequest.shown`), each as one character that no text has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, Message, text_message
from sftflow.chat.streaming import held_back
from sftflow.foundation.errors import SftflowError
from sftflow.foundation.sequences import common_prefix

_NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|analysis)"
OPENS = rf"<\|?{_NAME}\|?>|\[THINK\]|◁think▷"
CLOSES = rf"<\|?/\|?{_NAME}\|?>|\[/THINK\]|◁/think▷"
_CODES = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode keeps them for a program's own use
_THOUGHT, _SAID = "zqthought", "zqsaid"
_CALL = {"id": "probe0000", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
# In these, two tokens that stand around the same may differ.
_SIDES = re.compile(r"start|begin|open|prefix|end|close|suffix|[\W_]")


@dataclass(frozen=True)
class ThoughtMarks:
    """opening, closing: what stands in front of thoughts and behind them.   plain: what the template writes in front of
    a reply that has none.   always: whether every prompt opens them.   codes: the control tokens in these, by the
    character that stands for each.

    >>> ThoughtMarks("<think>", "</think>").begun("<|im_start|>assistant\\n<think>\\n")
    '<think>'
    """

    opening: str
    closing: str
    plain: str = ""
    always: bool = False
    codes: tuple[tuple[str, str], ...] = ()

    def coded(self, text: str) -> str:
        for token, code in self.codes:
            text = text.replace(token, code)
        return text

    def begun(self, prompt: str, reply: str = "") -> str:
        """What a reply has of its thoughts before its first token.   reply: its text in the prompt's end."""
        opened = self.coded(prompt.removesuffix(reply)).rstrip().endswith(self.opening)
        return (self.opening if opened else "") + self.coded(reply)

    def shown(self, renderer: Renderer) -> tuple[tuple[int, str], ...]:
        """The control tokens that are asked of the engine: their ids, and what stands for them in the text."""
        return tuple((renderer.special[token], code) for token, code in self.codes)


def learn_thoughts(renderer: Renderer) -> ThoughtMarks | None:
    """The format's marks; None where its template knows of no thoughts."""

    def text(*reply: Message) -> str:
        try:
            conversation = Conversation((text_message("user", "u"), *reply))
            return renderer.text(conversation, add_generation_prompt=not reply)
        except SftflowError:
            return ""

    said = text_message("assistant", _SAID)
    prompt, plain = text(), text(said).partition(_SAID)[0]
    before, thought, rest = text(replace(said, reasoning_content=_THOUGHT)).partition(_THOUGHT)
    between, found, _ = rest.partition(_SAID)
    tokens = re.compile(f"{renderer.special_re.pattern}|</?[^<>\\s]{{1,40}}>")
    if thought and found and between.strip():
        start = _header(min(common_prefix(before, prompt), common_prefix(before, plain)), before, tokens)
        opening, closing, plain = before[start:].strip(), between.strip(), plain[start:].strip()
        if opening:
            plain = "" if plain.startswith(opening) else plain
            closing = closing.removesuffix(plain).strip() or closing
        else:  # the template writes the block even where there are no thoughts
            opening, closing = _pair(before, closing, tokens)
            plain = between.strip().removeprefix(closing).strip()
    else:
        start = _header(common_prefix(prompt, plain), prompt, tokens)
        block, plain = prompt[start:].strip(), plain[start:].strip()
        # A block that is opened and closed, for a model that is not to think.
        places = [m.start() for m in tokens.finditer(block)]
        pairs = [_pair(block[:at], block[at:], tokens) for at in places[1:] if places[0] == 0]
        # Reasoning in front of a call.
        called = replace(said, parts=(), tool_calls=(_CALL,), reasoning_content=_THOUGHT)
        before, thought, rest = text(called).partition(_THOUGHT)
        pairs += [_pair(before, rest, tokens)] if thought else []
        # Tags that the template only looks for in a content, to cut out what stands between them.
        tag = re.search(CLOSES, renderer.format.template, re.I)
        pairs += [(tag.group().replace("/", "", 1), tag.group())] if tag else []
        opening, closing = next((pair for pair in pairs if pair[0]), ("", ""))
        plain = "" if plain.startswith((opening, closing)) else plain
    if not opening:
        return None
    control = dict.fromkeys(m.group() for m in renderer.special_re.finditer(opening + closing + plain))
    codes = tuple(zip(control, _CODES, strict=False))
    marks = ThoughtMarks(opening, closing, plain, codes=codes)
    opening, closing, plain, prompt = map(marks.coded, (opening, closing, plain, prompt))
    return ThoughtMarks(opening, closing, plain, prompt.rstrip().endswith(opening), codes)


def _header(end: int, text: str, tokens: re.Pattern[str]) -> int:
    """Where what is common to texts ends, with no token cut in two."""
    return next((m.start() for m in tokens.finditer(text) if m.start() < end < m.end()), end)


def _pair(before: str, after: str, tokens: re.Pattern[str]) -> tuple[str, str]:
    """What opens thoughts at the end of a text and closes them at the beginning of another, by their names: alike but
    for the side, `<|START_THINKING|>` and `<|END_THINKING|>`. ("", "") where there is no such pair.

    >>> _pair("<|turn>model\\n<|channel>thought\\n", "<channel|>Hi", re.compile("<[^<>]*>"))
    ('<|channel>thought', '<channel|>')
    """
    starts = [m.start() for m in tokens.finditer(before)][:-4:-1]
    ends = [m.end() for m in tokens.finditer(after)][:3] if tokens.match(after.lstrip()) else []
    for start in starts:
        for end in ends:
            opening, closing = before[start:].strip(), after[:end].strip()
            token = tokens.match(opening)
            names = {_SIDES.sub("", side.lower()) for side in (closing, opening)}
            first = {_SIDES.sub("", side.lower()) for side in (closing, token.group() if token else "")}
            if opening != closing and (len(names) == 1 or (len(first) == 1 and start == starts[0])):
                return opening, closing
    return "", ""


class Piece(NamedTuple):
    """A part of a reply's text.   at: where in it, in characters; -1: nowhere, a blank line between two blocks."""

    kind: Literal["thought", "said"]
    text: str
    at: int


class ThoughtReader:
    """Takes a reply's text apart as it comes: `feed`, `flush` -> pieces (see `streaming`).

    Blank lines around thoughts are the template's. Tags open thoughts at the reply's beginning only, control tokens
    anywhere. Thoughts that do not end are thoughts to the reply's end.
    """

    def __init__(self, marks: ThoughtMarks, begun: str = "") -> None:
        """begun: see `ThoughtMarks.begun`."""
        self._marks = marks
        self._codes = {code for _, code in marks.codes}
        self._anywhere = bool(self._codes & set(marks.opening))
        self._text, self._at = "", 0  # what has not been given out, and where it begins
        self._state: Literal["start", "thought", "said"] = "start"
        self._n_blocks = self._n_given = 0
        self.feed(begun)
        self._at -= len(begun)

    def feed(self, piece: str) -> list[Piece]:
        self._text += piece
        return list(self._take(final=False))

    def flush(self) -> list[Piece]:
        return list(self._take(final=True))

    def _take(self, *, final: bool) -> Iterator[Piece]:
        state = None
        while state != self._state:  # until nothing more is certain
            state = self._state
            yield from {"start": self._start, "thought": self._thought, "said": self._said}[state](final)

    def _drop(self, n: int) -> None:
        self._text, self._at = self._text[n:], self._at + n

    def _give(self, kind: Literal["thought", "said"], n: int) -> Iterator[Piece]:
        """The next n characters, without control tokens."""
        for run in re.finditer(f"[^{_CODES}]+", self._text[:n]):
            yield Piece(kind, run.group(), self._at + run.start())
        self._drop(n)

    def _start(self, final: bool) -> Iterator[Piece]:
        """At the reply's beginning, or behind thoughts."""
        text = self._text.lstrip()
        gap = len(self._text) - len(text)
        for word, then in ((self._marks.opening, "thought"), (self._marks.plain, "said")):
            if word and text.startswith(word):
                self._drop(gap + len(word))
                self._state, self._n_blocks = then, self._n_blocks + (then == "thought")  # type: ignore[assignment]
                self._n_given = 0
                return
            if word.startswith(text) and word and not final:
                return
        if self._n_blocks:
            self._drop(len(self._text) - len(self._text.lstrip("\n")))
        if self._text:
            self._state = "said"
        yield from ()

    def _thought(self, final: bool) -> Iterator[Piece]:
        if not self._n_given:
            self._drop(len(self._text) - len(self._text.lstrip("\n")))
        end = self._text.find(self._marks.closing)
        held = 0 if final or end >= 0 else held_back(self._text, [self._marks.closing])
        sure = self._text[: end if end >= 0 else len(self._text) - held].rstrip("\n")
        if sure:
            if self._n_blocks > 1 and not self._n_given:
                yield Piece("thought", "\n\n", -1)  # between two blocks
            self._n_given += len(sure)
            yield from self._give("thought", len(sure))
        if end >= 0:
            self._drop(self._text.find(self._marks.closing) + len(self._marks.closing))
            self._state = "start"

    def _said(self, final: bool) -> Iterator[Piece]:
        opening = self._marks.opening
        at = self._text.find(opening) if self._anywhere else -1
        held = held_back(self._text, [opening]) if self._anywhere and not final else 0
        yield from self._give("said", at if at >= 0 else len(self._text) - held)
        if at >= 0:
            self._state = "start"


def split_thoughts(marks: ThoughtMarks, text: str, begun: str = "") -> tuple[str, str]:
    """(thoughts, words) of a whole reply.

    >>> split_thoughts(ThoughtMarks("<think>", "</think>"), "<think>\\nhm\\n</think>\\n\\nYes.")
    ('hm', 'Yes.')
    """
    reader = ThoughtReader(marks, begun)
    pieces = [*reader.feed(text), *reader.flush()]
    thought, said = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("thought", "said"))
    return thought, said
