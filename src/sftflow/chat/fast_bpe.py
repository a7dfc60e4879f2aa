"""Byte-level BPE with remembered words: the same ids as the tokenizer's, three to four times as fast.

Most of a byte-level tokenizer's time goes into splitting text by its Unicode regular expression. On everyday characters
(ASCII, Latin letters, typographic punctuation) that expression can be written for Python's `re`, and text repeats its
words: each is given to the tokenizer's own BPE model once. Whatever is not known to be the same (other characters,
other kinds of tokenizers) goes the tokenizer's own way; the tests compare the two on random text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import chain
from typing import Any

_MOST_WORDS = 1 << 20
_LONGEST_WORD = 100
"""characters of a word that is remembered"""

# Characters whose categories have not changed in any version of Unicode, that no normal form C changes, and that are
# neither white space nor, ignoring case, equal to an ASCII letter (as the long s, U+017F, is).
_OTHER = {0x85, 0xA0, 0x17F}
_ALPHABET = [chr(c) for c in (*range(0x17F), *range(0x2010, 0x2028), 0x20AC) if c not in _OTHER]
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same between digits that stand alone: blanks before a digit are the last of their piece.
_DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# What the self-test encodes both ways before the short way is taken.
_PROBE = (
    "It's 48/2 = 24.\n\n  Two  spaces,\ttabs\t\tand\r\nlines \n x = f(y)[1:] # ok!!\n\n\n   I'LL We'Ve a'b 'Re "
    + "".join(_ALPHABET[1:])
    + " ".join(_ALPHABET[1:])
    + "x’s “Hi” 1234567 12.50€ cafés ÜBER x² __init__ CamelCase HTTPServer \n "
)


def _members(category: str) -> str:
    """The alphabet's characters of a general category (or of all that begin so), for use inside brackets."""
    return "".join(re.escape(c) for c in _ALPHABET if unicodedata.category(c).startswith(category))


_BEYOND = re.compile(f"[^{''.join(map(re.escape, _ALPHABET))}]")


def python_pattern(pattern: str) -> str | None:
    """A tokenizer's split pattern as one for `re` on the alphabet, to be compiled with re.ASCII; None where it uses
    what is not translated.

    >>> python_pattern(r"\\p{Nd}{1,3}|\\s+")
    '[0123456789]{1,3}|\\\\s+'
    """
    out, at, inside = [], 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            found = re.match(r"\\p\{([A-Z][a-z]?)\}", pattern[at:])
            if found:
                members = _members(found.group(1))
                out.append(members if inside else f"[{members}]" if members else "(?!)")
                at += found.end()
                continue
            if pattern[at + 1 : at + 2] not in tuple("rntsS.[](){}?*+|^$/\\-'"):
                return None
            out.append(pattern[at : at + 2])
            at += 2
            continue
        if inside and (char == "[" or pattern.startswith("&&", at)):
            return None  # Oniguruma's sets of sets
        inside = char == "[" or (inside and char != "]")
        out.append(char)
        at += 1
    return "".join(out)


class WordCache:
    """Encodes text by words. Made by `of`, which gives None where the tokenizer is of another kind."""

    def __init__(self, backend: Any, pattern: re.Pattern[str], added: dict[str, int]) -> None:
        self._backend = backend
        self._split = pattern.findall
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._added_re = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._words = _Words(backend.model)

    @classmethod
    def of(cls, backend: Any) -> WordCache | None:
        """For a `tokenizers.Tokenizer`, after a self-test; None where the short way is not known to be the same."""
        pattern = _split_pattern(backend)
        added = backend.get_added_tokens_decoder()
        plain = not any(t.single_word or t.lstrip or t.rstrip or t.normalized for t in added.values())
        if pattern is None or not plain:
            return None
        words = cls(backend, pattern, {t.content: i for i, t in added.items()})
        for text in (_PROBE, _PROBE.lower(), _PROBE[::-1], *(f"a{token} b" for token in list(words._added)[:8])):
            if words.encode(text) != backend.encode(text, add_special_tokens=False).ids:
                return None
        return words

    def encode(self, text: str) -> list[int]:
        """Ids of the text, strings of added tokens becoming those tokens."""
        out: list[int] = []
        at = 0
        for found in self._added_re.finditer(text):
            if found.start() > at:
                self._append(text[at : found.start()], out)
            out.append(self._added[found.group()])
            at = found.end()
        if at < len(text):
            self._append(text[at:], out)
        return out

    def _append(self, text: str, out: list[int]) -> None:
        if not text.isascii() and _BEYOND.search(text):
            out += self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        out += chain.from_iterable(map(self._words.__getitem__, self._split(text)))


class _Words(dict[str, list[int]]):
    """Word -> ids, asked of the tokenizer's model when a word is first seen."""

    def __init__(self, model: Any) -> None:
        from tokenizers import Tokenizer

        super().__init__()
        self._model, self._letters = model, byte_letters()
        self._alone = Tokenizer(model)  # splits nothing

    def __missing__(self, word: str) -> list[int]:
        letters = word.encode().decode("latin-1").translate(self._letters)
        if len(word) > _LONGEST_WORD:
            # May take seconds, in which the model itself would let no other thread run; and it would fill the memory.
            ids: list[int] = self._alone.encode_batch_fast([letters], add_special_tokens=False)[0].ids
            return ids
        self[word] = ids = [t.id for t in self._model.tokenize(letters)]
        return ids


def _split_pattern(backend: Any) -> re.Pattern[str] | None:
    """How the tokenizer cuts text into words; None where it does more than that."""
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return None
    if backend.normalizer is not None and json.loads(backend.normalizer.__getstate__())["type"] != "NFC":
        return None
    if backend.pre_tokenizer is None:
        return None
    steps = json.loads(backend.pre_tokenizer.__getstate__())
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"] and len(steps) == 1:
        source = _GPT2_PATTERN
    elif last["use_regex"] and len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True}:
        source = _DIGITS_PATTERN
    elif not last["use_regex"] and len(steps) == 2 and _splits(steps[0]):
        source = steps[0]["pattern"]["Regex"]
    else:
        return None
    translated = python_pattern(source)
    try:
        pattern = None if translated is None else re.compile(translated, re.ASCII)
    except re.error:
        return None
    return pattern if pattern and not pattern.groups else None


def _splits(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]
    )


def byte_letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write each of the 256 bytes as: printable Latin-1 characters stand for
    themselves, the others are those from U+0100 on (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
