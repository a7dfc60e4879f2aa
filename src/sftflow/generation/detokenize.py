"""Ids -> text as they come: whole characters, and nothing that may yet turn out to be part of a stop text.

    ids --Detokenizer--> text --StopTexts--> text up to a stop text          both in a row: ReplyText

Each is a `StreamDecoder`. The pieces, joined, are what `ReplyDecoder` makes of the same ids at once; a token costs the
same however long the reply is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from sftflow.chat.streaming import held_back, outputs

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

    def feed(self, token: int) -> str:
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
    return "".join(outputs(Detokenizer(decode, skipped), ids))


class StopTexts:
    """Lets text through up to the first stop text; holds back what may be the beginning of one.

    found: the stop text that came.   held: what is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
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
        end = len(text) - held_back(text, self._stops)
        self.held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Nothing more comes: what was held back is text after all."""
        text, self.held = self.held, ""
        return text


class ReplyText:
    """What a person reads of a reply while it is made: the text outside the calculator's calls and their results.

    run: what makes text of the ids outside.   python: (call start, call end, output start, output end) ids, or None.
    stops: the text ends before the first of these.   shown: control tokens that it has nevertheless, by their ids; no
    stop text lies across one.
    """

    def __init__(
        self,
        run: Detokenizer,
        python: tuple[int, int, int, int] | None = None,
        stops: Sequence[str] = (),
        shown: Sequence[tuple[int, str]] = (),
    ) -> None:
        self._run, self._python, self._stops, self._shown = run, python, StopTexts(stops), dict(shown)
        self._outside = True

    @property
    def stopped_by(self) -> str | None:
        return self._stops.found

    @property
    def waits(self) -> bool:
        """Whether tokens have come whose text cannot be shown yet."""
        return self._stops.found is None and (self._run.waits or bool(self._stops.held))

    def feed(self, token: int) -> str:
        if token in self._shown:
            text = self.flush()
            return text if self._stops.found is not None else text + self._shown[token]
        if self._python is not None and token in self._python:
            self._outside = token in (self._python[1], self._python[3])
            return self._stops.feed(self._run.flush())
        return self._stops.feed(self._run.feed(token)) if self._outside else ""

    def flush(self) -> str:
        return self._stops.feed(self._run.flush()) + self._stops.flush()
