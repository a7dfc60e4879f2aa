"""How many tokens a text has at the very least, without encoding it: what cannot fit is refused before it is encoded.

A token covers only so many bytes of text. Let each byte cost one part in as many as the longest token has that holds
such a byte: then all bytes of a token, whichever it is, cost one token at most, and their sum is a lower bound. Another
is the number of words, where no token goes on behind a word's end.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.fast_bpe import byte_letters

NFC_SHRINKS = 4
"""bytes that normal form C makes one of, at most: 3.5, where seven (U+1FBE U+0308 U+0301) become two (U+0390). ASCII
stays as it is."""
BLOCK = 1 << 16
_WORD_END = re.compile(rb"[A-Za-z] ")
_LETTERS = np.array([chr(byte).isascii() and chr(byte).isalpha() for byte in range(256)])
BLANK = "▁"  # what SentencePiece writes for one


class FewestTokens:
    """Counts for one tokenizer. It says 0 where text may vanish on its way to the tokens, or shrink by as much as it
    likes: with other models than a BPE that knows every byte, and with normalisers that strip.

    tokenizer: its tokenizer.json.
    """

    def __init__(self, tokenizer: str) -> None:
        data = json.loads(tokenizer)
        normalizer, pieces = _steps(data["normalizer"], "normalizers"), _steps(data["pre_tokenizer"], "pretokenizers")
        self._composes = any(step["type"] == "NFC" for step in normalizer)
        known = data["model"]["type"] == "BPE" and all(map(_keeps, normalizer)) and all(map(_splits, pieces))
        tokens = _tokens(data["model"], {step["type"] for step in [*normalizer, *pieces]}) if known else []
        self._parts = _parts(tokens, data["added_tokens"]) if tokens else None
        added = [t["content"].encode() for t in data["added_tokens"]]
        self._ends_words = not any(map(_WORD_END.search, [*tokens, *added]))

    def __call__(self, text: str, most: int) -> int:
        """How many tokens the text has at least, where those are `most` or more; else 0. It reads no further."""
        if self._parts is None or 4 * len(text) < most:
            return 0
        shrinks = NFC_SHRINKS if self._composes and not text.isascii() else 1
        n, words = 0.0, 0
        for start in range(0, len(text), BLOCK):
            block = np.frombuffer(text[start : start + BLOCK].encode(), np.uint8)
            n += float(np.bincount(block, minlength=256) @ self._parts) / shrinks * (1 - 1e-9)  # rounding adds nothing
            if self._ends_words:
                words += int(np.count_nonzero(_LETTERS[block[:-1]] & (block[1:] == ord(" "))))
            if max(n, words) >= most:
                return int(max(n, words))
        return 0


def _steps(value: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer."""
    if value is None:
        return []
    return [step for v in value[inner] for step in _steps(v, inner)] if value["type"] == "Sequence" else [value]


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a normaliser only adds to the text, composes it, or writes its blanks otherwise."""
    blanks = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == BLANK
    return blanks or step["type"] in ("NFC", "Prepend")


def _splits(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves out nothing."""
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Metaspace" and step["replacement"] == BLANK)


def _tokens(model: dict[str, Any], steps: set[str]) -> list[bytes]:
    """The text that each token covers; none where the model does not know every byte."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    if "ByteLevel" in steps:
        if steps & {"Replace", "Metaspace"} or not letters.keys() <= model["vocab"].keys():
            return []
        return [bytes(letters[c] for c in token if c in letters) for token in model["vocab"]]
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        return [token.replace(BLANK, " ").encode() for token in model["vocab"]]
    return []


def _parts(tokens: list[bytes], added: list[dict[str, Any]]) -> NDArray[np.float64]:
    """(256,): the part of a token that each byte costs."""
    longest = np.ones(256)
    for token in sorted([*tokens, *(t["content"].encode() for t in added)], key=len):
        longest[list(token)] = len(token)
    free = BLANK  # one byte in the tokens, but three where the text itself has it
    if any(t["lstrip"] or t["rstrip"] for t in added):  # such a token swallows white space, however much
        free += "".join(c for c in map(chr, range(0x3001)) if c.isspace())
    longest[list(free.encode())] = np.inf
    return 1 / longest
