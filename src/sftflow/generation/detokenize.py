"""Ids -> text as they come: whole characters, and nothing that may yet turn out to be part of a stop text.

What is shown, joined, is what `ReplyDecoder` makes of the same ids at once; a token costs the same however long the
reply is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[list[int]], str]
UNFINISHED = "\ufffd"
LONGEST = 8
"""tokens that are waited for to finish a character: its bytes are four at most"""


class Detokenizer:
    """One run of ids as text, piece by piece.

    Some tokenizers drop the leading space of what they decode alone, so each piece is decoded behind the one before it,
    and what that gives alone is taken off. A piece that does not end in U+FFFD ends with a whole character, and nothing
    that follows can change it; one that does is waited for.
    """

    def __init__(self, decode: Decode, skipped: Collection[int] = ()) -> None:
        """skipped: ids that are no text (control tokens)."""
        self._decode, self._skipped = decode, skipped
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []

    @property
    def waits(self) -> bool:
        """Whether tokens have been taken whose text is still to come."""
        return bool(self._pending)

    def push(self, token: int) -> str:
        """The text that is settled with this token."""
        if token in self._skipped:
            return ""
        self._pending.append(token)
        text = self._decode(self._before + self._pending)
        if not text.endswith(UNFINISHED):
            new = text[len(self._before_text) :]
            self._before, self._pending = self._pending, []
            self._before_text = self._decode(self._before)
            return new
        return self._settle(text) if len(self._pending) % LONGEST == 0 else ""

    def flush(self) -> str:
        """What is left, finished or not; then a new run begins."""
        text = self._decode(self._before + self._pending)[len(self._before_text) :] if self._pending else ""
        self._before, self._before_text, self._pending = [], "", []
        return text

    def _settle(self, text: str) -> str:
        """Bytes that are no text at all would be waited for without end. Where two pieces decode apart as they do
        together, no character lies across the cut."""
        for cut in range(len(self._pending) - 1, 0, -1):
            head = self._decode(self._before + self._pending[:cut])
            tail = self._decode(self._pending[cut:])
            if tail and head + tail == text:
                new = head[len(self._before_text) :]
                self._before, self._before_text, self._pending = [], "", self._pending[cut:]
                return new
        return ""


def detokenize(decode: Decode, ids: Sequence[int], skipped: Collection[int] = ()) -> str:
    """A whole run at once; where bytes in it are no text, exactly as they come out piece by piece."""
    text = decode(list(ids))
    if UNFINISHED not in text:
        return text
    pieces = Detokenizer(decode, skipped)
    return "".join([*(pieces.push(i) for i in ids), pieces.flush()])


class StopTexts:
    """Lets text through up to the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What can be shown now. Nothing after a stop text was found."""
        if self.found is not None or not text:
            return ""
        text = self.held + text
        # The one that is whole first, so that it does not matter in what pieces the text comes.
        places = [(text.index(s) + len(s), text.index(s), s) for s in self._stops if s in text]
        if places:
            _, at, self.found = min(places)
            self.held = ""
            return text[:at]
        shown = hold_back(text, self._stops)
        self.held = text[len(shown) :]
        return shown

    def flush(self) -> str:
        """Nothing more comes: what was held back is text after all."""
        text, self.held = self.held, ""
        return text


def hold_back(text: str, stops: Sequence[str]) -> str:
    """The part of a text that cannot turn out to be the beginning of a stop text.

    >>> hold_back("so 3\\n", ["\\n\\n"])
    'so 3'
    """
    hold = 0
    for stop in stops:
        for n in range(min(len(stop), len(text)), hold, -1):
            if text.endswith(stop[:n]):
                hold = n
                break
    return text[: len(text) - hold]


class SpokenText:
    """What a person reads of a reply while it is made: the text outside the calculator's calls and their results.

    python: (call start, call end, output start, output end) ids, or None.
    """

    def __init__(
        self,
        decode: Decode,
        skipped: Collection[int],
        python: tuple[int, int, int, int] | None,
        stops: Sequence[str] = (),
    ) -> None:
        self._run = Detokenizer(decode, skipped)
        self._python = python
        self._spoken = True
        self._stops = StopTexts(stops)
        self._shown: list[str] = []
        self._taken = 0

    @property
    def stopped_by(self) -> str | None:
        return self._stops.found

    @property
    def waits(self) -> bool:
        """Whether tokens have come whose text cannot be shown yet."""
        return self._stops.found is None and (self._run.waits or bool(self._stops.held))

    def push(self, token: int) -> None:
        if self._python is not None and token in self._python:
            self._show(self._run.flush())
            self._spoken = token in (self._python[1], self._python[3])
        elif self._spoken:
            self._show(self._run.push(token))

    def finish(self) -> None:
        """No token comes any more."""
        self._show(self._run.flush())
        self._shown.append(self._stops.flush())

    def take(self) -> str:
        """What can be shown and has not been taken."""
        text = "".join(self._shown[self._taken :])
        self._taken = len(self._shown)
        return text

    def whole(self) -> str:
        return "".join(self._shown)

    def _show(self, text: str) -> None:
        if shown := self._stops.push(text):
            self._shown.append(shown)
