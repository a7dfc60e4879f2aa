"""Tokens as clients see them: their text, their bytes, their log-probabilities, in the OpenAI shapes."""

from __future__ import annotations

import codecs
import functools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from sftflow.chat.streaming import outputs
from sftflow.chat.token_rows import token_bytes
from sftflow.generation.detokenize import Detokenizer, ReplyText
from sftflow.generation.request import TokenLogprob

LEAST = -9999.0
"""what OpenAI writes for a log-probability that JSON has no number for"""


class TokenTable(dict[int, bytes]):
    """The bytes that each id stands for, once `learn` has asked for it: for many at once, which is cheaper."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def learn(self, ids: Iterable[int], tokens: Iterable[TokenLogprob | None] = ()) -> None:
        wanted = [*ids, *(i for t in tokens if t is not None for i in (t.id, *(j for j, _ in t.top)))]
        missing = [i for i in dict.fromkeys(wanted) if i not in self]
        self.update(zip(missing, token_bytes(self._tokenizer, missing), strict=True))

    def text(self, token: int) -> str:
        """The token's text, alone; U+FFFD for a part of a character."""
        return self[token].decode("utf-8", "replace")


class ReplyLogprobs:
    """A chat reply's tokens in the shape of choices[].logprobs, piece by piece: {"content": entries, "refusal": None}.

    The entries of `content` are the tokens that the message's content is made of, those of `reasoning_content` and
    `tool_calls`, where there are any, of what was read as such; their bytes, joined, are that text. A token that shows
    no text (an end of turn, the calculator's calls and results, the marks around thoughts, a stop text) has none; of
    one that is shown in part, that part stands.
    """

    def __init__(self, table: TokenTable, control_ids: frozenset[int], text: ReplyText) -> None:
        """text: what makes text of ids, to the reply's end."""
        self.table, self._control_ids, self._text = table, control_ids, text
        self._kinds: list[str] = []  # of each character of the text that has been read
        self._groups: deque[tuple[list[TokenLogprob], int, str]] = deque()  # tokens, the text they bring, where it is
        self._tokens: list[TokenLogprob] = []  # whose text is still to come
        self._part, self._at = "", 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, tokens: Sequence[TokenLogprob], *, final: bool) -> None:
        """The next tokens."""
        for token in tokens:
            self._part += self._text.feed(token.id)
            if token.id not in self._control_ids:
                self._tokens.append(token)
            if not self._text.waits:
                self._close()
        if final:
            self._part += self._text.flush()
            self._close()

    def _close(self) -> None:
        self._groups.append((self._tokens, self._at, self._part))
        self._at += len(self._part)
        self._tokens, self._part = [], ""

    def read(self, kind: str, start: int, end: int) -> None:
        """What the text's characters from start to end were read as: they come in order."""
        self._kinds += [""] * (start - len(self._kinds)) + [kind] * (end - start)

    def take(self, *, final: bool = False) -> dict[str, Any] | None:
        """The entries of what was read since the last time; None where there are none."""
        out: dict[str, Any] = {"content": [], "refusal": None}
        found = False
        while self._groups and (final or self._groups[0][1] + len(self._groups[0][2]) <= len(self._kinds)):
            tokens, at, text = self._groups.popleft()
            kinds = self._kinds[at : at + len(text)]
            for kind in filter(None, dict.fromkeys(kinds)):
                part = "".join(c for c, k in zip(text, kinds, strict=False) if k == kind)
                out.setdefault(kind, []).extend(self._entries(tokens, part))
                found = True
        return out if found else None

    def _entries(self, tokens: Sequence[TokenLogprob], text: str) -> list[dict[str, Any]]:
        """tokens: those that bring this text: one, or those that share a character."""
        self.table.learn((), tokens)
        own = [self.table[t.id] for t in tokens]
        if b"".join(own).decode("utf-8", "replace") != text:
            own = [b""] * (len(own) - 1) + [text.encode()]  # it is shown in part
        return [
            {**_entry(shown, t.logprob), "top_logprobs": [_entry(self.table[i], p) for i, p in t.top]}
            for t, shown in zip(tokens, own, strict=True)
        ]


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(token)}


def joined_logprobs(pieces: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Those of a whole reply."""
    out: dict[str, Any] = {"content": [], "refusal": None}
    for piece in filter(None, pieces):
        for kind, entries in piece.items():
            if entries:
                out.setdefault(kind, []).extend(entries)
    return out


class TextLogprobs:
    """Tokens in the shape of choices[].logprobs of a plain completion, piece by piece: {"tokens", "token_logprobs",
    "top_logprobs", "text_offset"}.

    An offset is the number of characters in front of the token's first; a part of a character has the offset of that
    character. Tokens without text (BOS, the end token, what stands in a calculator's call) take no characters, and none
    is beyond the text's end, as a stop text would be.
    """

    def __init__(
        self, table: TokenTable, control_ids: frozenset[int], python: tuple[int, int, int, int] | None = None
    ) -> None:
        """python: as in `ReplyText`."""
        self.table, self.control_ids, self._python = table, control_ids, python or ()
        self._hidden = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def shape(
        self, ids: Sequence[int], tokens: Sequence[TokenLogprob | None], n_text: int, *, shown: bool = False
    ) -> dict[str, Any]:
        """ids: of these tokens, for the first of a prompt has no log-probability.   n_text: characters of the text with
        them.   shown: whether control tokens stand in the text, as they do in that of a prompt given as ids."""
        self.table.learn(ids, tokens)
        offsets = []
        for token in ids:
            offsets.append(min(self._offset, n_text))
            if not shown and token in self._python:
                self._hidden = token in self._python[::2]
            if shown or not (self._hidden or token in self.control_ids):
                self._offset += len(self._decoder.decode(self.table[token]))
        return {
            "tokens": [self.table.text(i) for i in ids],
            "token_logprobs": [None if t is None else max(t.logprob, LEAST) for t in tokens],
            "top_logprobs": [None if t is None else self._top(t) for t in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """text -> log-probability: the likeliest, and the token itself. Of two tokens with one text (parts of
        characters) the likelier stands."""
        out: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            text = self.table.text(i)
            out[text] = max(logprob, out.get(text, LEAST))
        return out


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, control tokens too; joined, they are the decoded prompt. A character that several tokens
    share stands with the last of them, and the others are empty."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    *texts, rest = outputs(Detokenizer(decode), ids)
    return [*texts[:-1], texts[-1] + rest] if texts else []
