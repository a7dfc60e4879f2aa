"""IFEval's 25 verifiable instructions (Zhou et al. 2023, arXiv 2311.07911, table 1), one small function each.

A function takes the reply and the arguments of the row's `kwargs`. Its rules are those the published scores were made
with, also where they are looser than the instruction's words; such cases are named in its docstring. An empty reply
never gets here. A new instruction is one function and its name in GROUPS.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from sftflow.tasks.ifeval_text import count_capital_words, count_sentences, count_words, language_of, language_package

Relation = str


def holds(count: int, relation: Relation, bound: int) -> bool:
    """3 "at least" 3 -> True;  3 "less than" 3 -> False"""
    return count < bound if relation == "less than" else count >= bound


# ---- keywords


def existence(reply: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, in any case, also inside a longer word."""
    return all(_occurrences(word, reply) for word in keywords)


def frequency(reply: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    """How often the keyword occurs, in any case, also inside longer words."""
    return holds(_occurrences(keyword.strip(), reply), relation, frequency)


def forbidden_words(reply: str, *, forbidden_words: list[str]) -> bool:
    """None occurs as a whole word, in any case: "rock" forbids "Rock." but not "rocket"."""
    return not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", reply, re.IGNORECASE) for w in forbidden_words)


def letter_frequency(reply: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    """How often the character occurs, in any case. Two published rows count a sign, "#" and "!"."""
    return holds(reply.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _occurrences(word: str, reply: str) -> int:
    return len(re.findall(re.escape(word), reply, re.IGNORECASE))


# ---- language and length


def response_language(reply: str, *, language: str) -> bool:
    """The detected language. A reply with no letters to tell by follows, as in the published scores."""
    return language_of(reply) in (language, None)


def number_sentences(reply: str, *, num_sentences: int, relation: Relation) -> bool:
    return holds(count_sentences(reply), relation, num_sentences)


def number_words(reply: str, *, num_words: int, relation: Relation) -> bool:
    return holds(count_words(reply), relation, num_words)


def number_paragraphs(reply: str, *, num_paragraphs: int) -> bool:
    """Exactly this many, parted by ***; one may stand before the first or after the last, but none is empty."""
    blocks = _blocks(reply, "***")
    return blocks is not None and len(blocks) == num_paragraphs


def nth_paragraph_first_word(reply: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly this many paragraphs, parted by an empty line, and the nth begins with the word, in any case.

    Blank pieces (three line breaks and more) are not counted, but the nth is looked up among all pieces.
    """
    pieces = reply.split("\n\n")
    count = sum(bool(piece.strip()) for piece in pieces)
    if count != num_paragraphs or not 1 <= nth_paragraph <= count:
        return False
    words = pieces[nth_paragraph - 1].split()
    if not words:
        return False
    bare = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return bare.lower() == first_word.lower()


def _blocks(reply: str, divider: str) -> list[str] | None:
    """The pieces between dividers without a blank first or last one; None where one between is blank.

    "***a***b" -> a, b     "a******b" by *** -> None
    """
    blocks = [block.strip() for block in reply.split(divider)]
    if not all(blocks[1:-1]):
        return None
    return [block for block in blocks if block]


# ---- content and format


def postscript(reply: str, *, postscript_marker: str) -> bool:
    """The marker occurs, in any case, with or without a space after its inner points: "P. S." is P.S."""
    letters = map(re.escape, postscript_marker.strip().lower().split("."))
    return re.search(r"\.\s?".join(letters), reply.lower()) is not None


def number_placeholders(reply: str, *, num_placeholders: int) -> bool:
    """At least this many [placeholders]."""
    return len(re.findall(r"\[.*?\]", reply)) >= num_placeholders


def number_bullet_lists(reply: str, *, num_bullets: int) -> bool:
    """Exactly this many lines that begin with one * or with -, whatever follows the dash."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", reply, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", reply, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(reply: str) -> bool:
    """One of the three answers occurs: "My answer is yes." / no. / maybe."""
    return re.search(r"My answer is (yes|no|maybe)\.", reply) is not None


def number_highlighted_sections(reply: str, *, num_highlights: int) -> bool:
    """At least this many *highlights* or **highlights** that are not blank."""
    single = re.findall(r"\*([^\n*]*)\*", reply)
    double = re.findall(r"\*\*([^\n*]*)\*\*", reply)
    return sum(bool(text.strip()) for text in single + double) >= num_highlights


def multiple_sections(reply: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least this many headers such as "Section 2", in the case given."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", reply)) >= num_sections


def json_format(reply: str) -> bool:
    """The whole reply is one JSON value, in a fenced block or not."""
    text = reply.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(reply: str) -> bool:
    """A <<title>> on one line that is not blank."""
    return any(inner.lstrip("<").rstrip(">").strip() for inner in re.findall(r"<<([^\n]+)>>", reply))


# ---- combination, start and end


def two_responses(reply: str) -> bool:
    """Exactly two, different, parted by ******."""
    blocks = _blocks(reply, "******")
    return blocks is not None and len(blocks) == 2 and blocks[0] != blocks[1]


def repeat_prompt(reply: str, *, prompt_to_repeat: str) -> bool:
    """The reply begins with the request, in any case."""
    return reply.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(reply: str, *, end_phrase: str) -> bool:
    """The reply ends with the phrase, in any case; double quotes around the reply do not count."""
    return reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(reply: str) -> bool:
    """Straight double quotes around the whole reply."""
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# ---- case and punctuation


def capital_word_frequency(reply: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    return holds(count_capital_words(reply), capital_relation, capital_frequency)


def english_capital(reply: str) -> bool:
    """No small letter, and English as far as the language can be told."""
    return reply.isupper() and language_of(reply) in ("en", None)


def english_lowercase(reply: str) -> bool:
    """No capital letter, and English as far as the language can be told."""
    return reply.islower() and language_of(reply) in ("en", None)


def no_comma(reply: str) -> bool:
    return "," not in reply


GROUPS: dict[str, tuple[Callable[..., bool], ...]] = {
    "keywords": (existence, frequency, forbidden_words, letter_frequency),
    "language": (response_language,),
    "length_constraints": (number_sentences, number_paragraphs, number_words, nth_paragraph_first_word),
    "detectable_content": (number_placeholders, postscript),
    "detectable_format": (
        number_bullet_lists,
        constrained_response,
        number_highlighted_sections,
        multiple_sections,
        json_format,
        title,
    ),
    "combination": (two_responses, repeat_prompt),
    "startend": (end_checker, quotation),
    "change_case": (capital_word_frequency, english_capital, english_lowercase),
    "punctuation": (no_comma,),
}
CHECKS = {f"{group}:{check.__name__}": check for group, checks in GROUPS.items() for check in checks}
NEED_LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}

FITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number from 0", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
    "str": ("a text", lambda v: isinstance(v, str) and bool(v.strip())),
    "list[str]": ("a list of texts", lambda v: isinstance(v, list) and all(map(FITS["str"][1], v)) and bool(v)),
    "Relation": ("'less than' or 'at least'", lambda v: v in ("less than", "at least")),
}


def is_supported(name: str) -> bool:
    """Whether the instruction can be checked here: it is known, and langdetect is installed where it needs it."""
    return name in CHECKS and (name not in NEED_LANGUAGE or language_package() is not None)


@cache
def arguments_of(name: str) -> dict[str, str]:
    """What an instruction's kwargs hold, read from its function.

    >>> arguments_of("length_constraints:number_words")
    {'num_words': 'int', 'relation': 'Relation'}
    """
    parameters = inspect.signature(CHECKS[name]).parameters.values()
    return {p.name: str(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}


def wrong_argument(name: str, given: dict[str, Any]) -> str | None:
    """What is wrong with a known instruction's kwargs, in words, or None.

    >>> wrong_argument("punctuation:no_comma", {"keyword": "fig"})
    "punctuation:no_comma takes no 'keyword'"
    """
    wanted = arguments_of(name)
    for key in given.keys() - wanted.keys():
        return f"{name} takes no {key!r}"
    for key, kind in wanted.items():
        said, fits = FITS[kind]
        if not fits(given.get(key)):
            return f"{name} needs {said} under {key!r}"
    return None
