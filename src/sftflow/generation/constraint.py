"""Replies held to a grammar: which tokens may come next.

    a grammar's text --Grammars.compile--> Grammar (once for each text) --Constraint (one a reply)--> allowed, accept

Which bytes a grammar takes is the work of `llguidance`; here they are tokens of this model. A token counts by its
bytes, however a text is cut into tokens, so that no text of the grammar's language is kept from a model. Control tokens
are no text: none may come but those that the grammar names and, exactly where it may end, the ends of a turn.

Two things are kept from a model that would never end, and are no part of the grammar: more than MOST_DIGITS digits in a
row outside of quotes, and a circle of up to LONGEST_CIRCLE tokens that lasts for CIRCLING: a text in quotes is closed
there, or an object that gets the same keys again. And an exponent of JSON has two digits at most: 1e999 is no number
that a reader could hold.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftflow.chat.token_rows import token_bytes
from sftflow.foundation.errors import GrammarError, first_line

LONGEST = 64 * 1024
"""characters of a grammar: the time to compile one grows with the square of its alternatives, to half a second here"""
REMEMBERED, USES = 8, 256
"""grammars, and how often each is given out: its replies share what it has learnt, which grows to 100 MB at most"""
MOST_DIGITS, LONGEST_CIRCLE, CIRCLING = 20, 32, 64
EXPONENT, LARGE = re.compile(rb"\d[eE][+-]?\d*$"), re.compile(rb"\d[eE][+-]?\d{3}")
LIMITS = {"max_lexer_states": 250_000, "max_grammar_size": 100_000, "verbose_errors": False}
"""of llguidance: a text of bounded length takes nine states a character, a state 0.4 kB; the work for one token has
limits of its own, which are some 15 ms"""
PREAMBLE = '%llguidance {"no_forcing": true}\n'  # else one way to cut a text into tokens would be forced


class Grammars:
    """Compiles grammars for one model, from any thread.

    tokenizer: whose tokens they are.   control: ids that are no text.   size: of the model's vocabulary, which may have
    more ids than the tokenizer.
    """

    def __init__(self, tokenizer: Any, control: Collection[int], size: int) -> None:
        self._tokenizer, self._control, self._size = tokenizer, control, size
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str, str], Grammar] = OrderedDict()

    def compile(self, text: str, otherwise: str = "", *, place: str = "grammar") -> Grammar:
        """text: in the dialect of Lark that llguidance reads.   otherwise: another one, for replies whose likeliest
        first token begins a text of that and none of `text`.   place: what asked for it, in errors. Raises
        GrammarError: one is too long or refused, or no token of this model begins it."""
        if len(text) > LONGEST:
            raise GrammarError(place, f"{len(text)} characters; at most {LONGEST} are taken")
        key = text, otherwise, place
        with self._lock:
            known = self._compiled.get(key)
            if known is not None and known.uses < USES:
                self._compiled.move_to_end(key)
                known.uses += 1
                return known
            self._vocabulary = self._vocabulary or self._make_vocabulary()
        second = Grammar(self._vocabulary, otherwise, place) if otherwise else None
        grammar = Grammar(self._vocabulary, text, place, second)
        with self._lock:
            self._compiled[key] = grammar
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return grammar

    def _make_vocabulary(self) -> _Vocabulary:
        from llguidance import LLTokenizer, TokenizerWrapper

        flagged = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}

        class Words:
            eos_token_id = None  # it then adds one behind all ids: the bit that says whether the grammar may end
            bos_token_id = None
            tokens = token_bytes(self._tokenizer, range(self._size))
            special_token_ids = sorted(i for i in flagged.union(self._control) if i < self._size)

            def __call__(self, text: bytes) -> list[int]:
                raise AssertionError("nothing is forced, so that no text is cut into tokens")

        first = [word[:1] for word in Words.tokens]
        kinds = (b"0123456789", b'"', b"}", b"abcdfghijklmnopqrstuvwxyz")
        begins = (torch.tensor([bool(c) and c.lower() in some for c in first]) for some in kinds)
        ids = (
            torch.tensor([i for i, word in enumerate(Words.tokens) if re.search(some, word)], dtype=torch.long)
            for some in (rb"\d", rb"[eE][+-]?\d{3}")
        )
        return _Vocabulary(LLTokenizer(TokenizerWrapper(Words())), Words.tokens, *begins, *ids)


@dataclass(frozen=True)
class _Vocabulary:
    """words: the bytes of each id.   digits, quotes, braces, letters: (vocabulary,) which begin with a digit, `"`, `}`,
    a letter that is no exponent's.   numbers, exponents: the ids of those with a digit, with a large exponent."""

    tokenizer: Any
    words: list[bytes]
    digits: torch.Tensor
    quotes: torch.Tensor
    braces: torch.Tensor
    letters: torch.Tensor
    numbers: torch.Tensor
    exponents: torch.Tensor


class Grammar:
    """A compiled grammar at its beginning."""

    def __init__(self, vocabulary: _Vocabulary, text: str, place: str, otherwise: Grammar | None = None) -> None:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**LIMITS)
        self.matcher = LLMatcher(vocabulary.tokenizer, PREAMBLE + text, log_level=0, limits=limits)
        self.vocabulary, self.place, self.otherwise = vocabulary, place, otherwise
        self.uses, self.has_json = 0, "%json" in text
        Constraint(self, ()).allowed()


class Constraint:
    """Where one reply stands in its grammar.   ends: the ids of each end of a turn."""

    def __init__(self, grammar: Grammar, ends: Collection[tuple[int, ...]]) -> None:
        self._grammar, self._vocabulary = grammar, grammar.vocabulary
        self._matcher, self._otherwise = grammar.matcher.deep_copy(), grammar.otherwise
        self._size = len(self._vocabulary.words)
        self._ends = [end for end in ends if max(end) < self._size]
        self._ending: tuple[int, ...] = ()  # what has come of an end
        self._inside = torch.zeros(0, dtype=torch.bool)  # the ids that go on in the grammar
        self._last: deque[int] = deque(maxlen=LONGEST_CIRCLE)  # ids, the newest first
        self._repeats = [0] * LONGEST_CIRCLE  # how many of the newest ids were equal to those 1, 2, 3 ... before them
        self._n_digits = 0  # in a row, at the end of what has come
        self._tail = b""  # its last bytes

    @property
    def over(self) -> bool:
        """Whether nothing but the end of the turn can follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def begin(self, likeliest: int) -> None:
        """Before the first token: the model's own likeliest decides which of two grammars it is."""
        if self._otherwise is not None and not self.allowed()[likeliest]:
            other = Constraint(self._otherwise, self._ends)
            if other.allowed()[likeliest]:
                self._matcher = other._matcher
        self._otherwise = None

    def allowed(self) -> torch.Tensor:
        """(vocabulary,) which ids may come next. Raises GrammarError where none may."""
        n = len(self._ending)
        if n:
            found, may_end = torch.zeros(self._size, dtype=torch.bool), True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                self._grammar.uses = USES  # its limits may be reached, for the next reply as well
                raise GrammarError(self._grammar.place, _reason(self._matcher.get_error()))
            every = torch.from_numpy(np.unpackbits(bits, count=self._size + 1, bitorder="little").astype(bool))
            found, may_end = every[:-1], bool(every[-1])
            found[[end[-1] for end in self._ends]] = False  # a stop id ends the reply, also where it is text
            self._inside = found = self._led_out(found, may_end)
            found = found.clone()
        if may_end:
            found[[end[n] for end in self._ends if end[:n] == self._ending and len(end) > n]] = True
        if not found.any():
            raise GrammarError(self._grammar.place, "no token of this model can follow")
        return found

    def _led_out(self, found: torch.Tensor, may_end: bool) -> torch.Tensor:
        """What may come of these where a number would be too large, or the reply would else never end."""
        vocabulary = self._vocabulary
        numbers = vocabulary.exponents if EXPONENT.search(self._tail) is None else vocabulary.numbers
        # Where a letter or a quote may follow, it is a text in quotes.
        if self._grammar.has_json and len(numbers) and not (found & (vocabulary.quotes | vocabulary.letters)).any():
            small = found.clone()
            for i in numbers[found[numbers]].tolist():
                small[i] = not LARGE.search(self._tail + vocabulary.words[i])
            found = small if may_end or small.any() else found  # a number may end there, a given text may not
        circling = max(self._repeats) >= CIRCLING
        if not circling and self._n_digits < MOST_DIGITS:
            return found
        rest = found & vocabulary.quotes
        if not circling:
            rest = found if rest.any() else found & ~vocabulary.digits
        elif not rest.any():
            rest = found & vocabulary.braces
        return rest if may_end or rest.any() else found

    def accept(self, token: int) -> None:
        """The id that has come, one of those that were allowed."""
        if self._ending or not self._inside[token]:
            self._ending += (token,)
            return
        self._matcher.consume_token(token)
        for back, before in enumerate(self._last):
            self._repeats[back] = self._repeats[back] + 1 if before == token else 0
        self._last.appendleft(token)
        word = self._vocabulary.words[token]
        n = len(word) - len(word.rstrip(b"0123456789"))
        self._n_digits = n + (self._n_digits if n == len(word) else 0)
        self._tail = (self._tail + word)[-8:]


def _reason(message: str) -> str:
    """What llguidance says, in one line, without the place in a text that nobody but us has seen."""
    *_, reason = [first_line(ValueError(message)), *re.findall(r"^error: (.*)", message, re.M)]
    reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
    reason = re.sub(
        r"^Failed to generate regex for (\w+) range.*", r"a bound of the \1 is too large, or none is left", reason
    )
    reason = re.sub(r"^Unimplemented keys: \[(.*)\]", r"no grammar holds \1; leave it out, and check the reply", reason)
    return "no token of this model can follow" if reason.startswith("NoExtension") else reason
