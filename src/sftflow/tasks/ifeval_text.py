"""What the IFEval checkers count in a reply: sentences, words in capitals, and its language.

The published figures rest on NLTK (Punkt sentences, Treebank words). These few rules give the same counts on ordinary
English without it, and keep two of its habits so that scores stay comparable: a line break alone ends no sentence, and
"e.g.", "i.e." and "etc." do.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

LANGUAGE_SEED = 0  # langdetect samples n-grams: with one seed a text always gets the same language

_ABBREVIATIONS = """
mr mrs ms dr prof st jr sr rev hon gen col maj capt lt sgt adm gov sen rep
inc ltd co corp bros vs ave dept
jan feb apr aug sept sep oct nov dec mon tues wed fri
a.m p.m u.s u.k u.n u.s.a u.s.s.r d.c n.y n.j ph.d m.b.a
"""
_STARTERS = """
a the this that these those my your our his her its another each every all most many some
i he she it we you they there here what who which when where while how why whether
and but so yet nor for if as although though because since unless until after before once despite besides
in on at by with to under during unlike instead given
also however therefore moreover furthermore meanwhile nevertheless indeed perhaps maybe then thus next now soon still
finally later sometimes today together overall only even please let
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
STARTERS = frozenset(_STARTERS.split())
SENTENCE_END = re.compile(r"""[.?!](?![.?!])(?=\s|["')\]};*:@({\[])["')\]}]*+\s*+(?=\S)""")
BEFORE = re.compile(r"\S*\Z")
AFTER = re.compile(r"[^\w\s]*([^\W_]+)")

BETWEEN_WORDS = re.compile(r"[\s\[\](){}<>;@#$%&?!*\"`“”„‘’«»\u2012-\u2015]+|''+|--|\.{2,}|[,:](?!\d)")
CLITIC = re.compile(r"(?<=[^'])('[SsMmDd]|'(?:LL|ll|RE|re|VE|ve)|N'T|n't)\Z")
TWO_WORDS = frozenset(("CANNOT", "D'YE", "GIMME", "GONNA", "GOTTA", "LEMME", "MORE'N", "WANNA", "'TIS", "'TWAS"))


def count_words(reply: str) -> int:
    """Runs of letters, digits and underscores.

    >>> count_words("It's a well-kept 3.5-litre jar.")
    9
    """
    return len(re.findall(r"\w+", reply))


def count_sentences(reply: str) -> int:
    """Sentences, where one ends at . ? or ! (and closing quotes or brackets) before a space or other punctuation.

    >>> [count_sentences(t) for t in ("Dr. J. Smith came. He sat.", "Wait... what?! No!", "1. Figs\\n2. dates", "")]
    [2, 2, 2, 0]
    """
    text = reply.strip()
    return bool(text) + sum(ends_sentence(text, found) for found in SENTENCE_END.finditer(text))


def ends_sentence(text: str, found: re.Match[str]) -> bool:
    """Whether this mark ends a sentence, by the word before it and the word after it.

    Mr. Lee -> no     a.m. today -> no    a.m. The -> yes   J. Lee -> no    no... and -> no    no... The -> yes
    3. and  -> no     3. Next    -> yes   ok. and  -> yes   ok! and -> yes
    """
    if text[found.start()] != ".":
        return True
    # a token is far shorter than this; the bound keeps a long unbroken text from being read again at every mark
    before = BEFORE.search(text[max(0, found.start() - 60) : found.start()])
    word = before[0].lstrip("\"'([{<*_-:").lower() if before else ""
    after = AFTER.match(text, found.end())
    follower = after[1] if after else ""
    starts = follower[:1].isupper() and follower.lower() in STARTERS
    if word.endswith(".") or word in ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
        return starts
    return not (re.fullmatch(r"-?[\d.,]*\d", word) and follower[:1].islower())


def count_capital_words(reply: str) -> int:
    """Words without a small letter, as Treebank words: brackets and quotes part words, hyphens do not, and a
    contraction is two.

    >>> [count_capital_words(t) for t in ("I saw NASA's X-15 (FAST!)", "IT'S A", "DON'T", "**OK**, 3 Ok")]
    [4, 3, 2, 1]
    """
    return sum(_capitals_of(piece) for piece in BETWEEN_WORDS.split(reply) if piece)


def _capitals_of(piece: str) -> int:
    if piece.strip(".,:") in TWO_WORDS:
        return 2
    return sum(part.isupper() for part in CLITIC.split(piece.rstrip("."), maxsplit=1))


@functools.cache
def language_package() -> Any:
    """The optional package langdetect, or None."""
    try:
        return importlib.import_module("langdetect")
    except ImportError:
        return None


@functools.cache
def _detectors() -> Any:
    """A detector factory of our own, so that its seed is nobody else's. Loading the profiles takes half a second."""
    factory = importlib.import_module("langdetect.detector_factory")
    made = factory.DetectorFactory()
    made.set_seed(LANGUAGE_SEED)
    made.load_profile(factory.PROFILES_DIRECTORY)
    return made


def language_of(reply: str) -> str | None:
    """The ISO 639-1 code of the reply's language, or None where it has no letters to tell by ("123").

    "The cat sat on the mat." -> "en"    "Die Katze sitzt auf der Matte." -> "de"
    """
    detector = _detectors().create()
    detector.append(reply)
    try:
        return str(detector.detect())
    except language_package().LangDetectException:
        return None
