"""Tokens as clients see them: their text, their bytes, their log-probabilities, in the OpenAI shapes."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from sftflow.chat.streaming import outputs
from sftflow.chat.token_rows import token_bytes
from sftflow.generation.detokenize import Detokenizer
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


def chat_logprobs(table: TokenTable, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens in the shape of choices[].logprobs.content of a chat completion."""
    table.learn((), tokens)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": table.text(token), "logprob": max(logprob, LEAST), "bytes": list(table[token])}

    return [{**entry(t.id, t.logprob), "top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens]


class TextLogprobs:
    """Tokens in the shape of choices[].logprobs of a plain completion, piece by piece: {"tokens", "token_logprobs",
    "top_logprobs", "text_offset"}.

    An offset is the number of characters in front of the token's first; a part of a character has the offset of that
    character. Tokens without text (BOS, the end token) take no characters.
    """

    def __init__(self, table: TokenTable, control_ids: frozenset[int]) -> None:
        self.table, self.control_ids = table, control_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def shape(
        self, ids: Sequence[int], tokens: Sequence[TokenLogprob | None], *, shown: bool = False
    ) -> dict[str, Any]:
        """ids: of these tokens, for the first of a prompt has no log-probability.   shown: whether control tokens
        stand in the text, as they do in that of a prompt given as ids."""
        self.table.learn(ids, tokens)
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            if shown or token not in self.control_ids:
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
