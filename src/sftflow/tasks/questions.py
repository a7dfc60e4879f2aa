"""Your own questions as a task: a file of questions, answers and how to compare them. BoolQ, too.

    {"question": "Which bird sings?", "answer": ["a wren", "wren"]}                      any of them, as the whole reply
    {"question": "How many legs have 3 ants?", "answer": 18}                             the number it ends on
    {"question": "Which one flies?", "answer": "a wren", "choices": ["a mole", "a wren"]}     the letter, here B
    {"question": "Do moles fly?", "answer": false}                                       a choice of yes and no
    {"question": "Name a bird.", "answer": "\\\\b(wren|owl)\\\\b", "grader": "regex"}          found in the reply

Other keys of a row are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import SchemaError
from sftflow.tasks.answers import (
    answer_of,
    bare,
    holds_text,
    is_number,
    numbers_in,
    one_writing,
    same_number,
    same_text,
)
from sftflow.tasks.multiple_choice import LETTERS, first_letter, prompt
from sftflow.tasks.task import Item, Task, ask, make_item, rows_of, sample, text_of

SHAPE = '{"question": ..., "answer": ...}'
LONG_WORDS = 20  # beyond, no reply will ever equal the answer word for word


@dataclass(frozen=True, slots=True)
class Row:
    """place: FILE:LINE.   grader: its name, or "" for a long text that names none.   answers: any of them is right;
    one letter where there are choices."""

    place: str
    question: str
    grader: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]

    @property
    def asked(self) -> str:
        return prompt(self.question, self.choices) if self.choices else self.question


class Jsonl(Task):
    """Rows `{"question", "answer", "grader"?, "choices"?}` of any file `rows_of` reads. The file is its own split.

    Without `grader` it is choice where there are choices or the answer is true or false, number where every answer is
    a number, else exact; an answer of more than 20 words must name its grader. BoolQ's rows are such ones, asked closed
    book: a passage beside them is not shown.
    """

    name = "jsonl"
    max_new_tokens = 256

    def conversations(self, split: str = "train") -> list[Conversation]:
        """The answer as the reply, the first of several; the letter where there are choices."""
        return sample(self, (ask(row.asked, reply_of(row), row.place) for row in self._rows(split)))

    def items(self, split: str = "test") -> list[Item]:
        return sample(self, (self._item(row) for row in self._rows(split)))

    def grade(self, item: Item, reply: str) -> float:
        """1.0 where the reply is right by the row's grader (see GRADERS)."""
        if item.choices:
            return float(first_letter(reply, item.choices) == item.answer)
        same = GRADERS[item.answer["grader"]]
        return float(any(same(reply, answer) for answer in item.answer["answers"]))

    def _rows(self, split: str) -> Iterator[Row]:
        for place, row in rows_of(self, split):
            yield parse(row, place)

    def _item(self, row: Row) -> Item:
        if not row.grader:
            fact = f"an answer of more than {LONG_WORDS} words and no grader"
            raise SchemaError(row.place, fact, f'add "grader": one of {", ".join(GRADERS)}, or shorten it')
        free = {"grader": row.grader, "answers": list(row.answers)}
        answer = row.answers[0] if row.choices else free
        identity, letters = self.id_of(row.place), LETTERS[: len(row.choices)]
        return make_item(identity, row.asked, answer, choices=letters)


def is_found(reply: str, answer: str) -> bool:
    """The pattern is found in the reply as it stands or in one writing, letter case counting; write (?i) or ^...$ into
    it for other wishes."""
    said = answer_of(reply)
    return any(re.search(answer, text) for text in (said, one_writing(said)))


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "number": same_number,
    "contains": holds_text,
    "regex": is_found,
}


def parse(row: Any, place: str) -> Row:
    """One row of a file. Raises SchemaError naming FILE:LINE."""
    question = text_of(row, "question", place, SHAPE)
    truth = isinstance(row.get("answer"), bool)
    answers = answers_of(row.get("answer"), place)
    named, choices = row.get("grader"), choices_of(row.get("choices"), place)
    if named is not None and named not in (*GRADERS, "choice"):
        raise SchemaError(place, f"unknown grader {named!r}", f"write one of {', '.join(GRADERS)}, choice")
    if truth and not choices and named in (None, "choice"):
        choices = ("yes", "no")
    if named == "choice" and not choices:
        raise SchemaError(place, "the grader choice without choices", 'add "choices": [...]')
    if choices:
        if named not in (None, "choice"):
            raise SchemaError(place, f"choices with the grader {named}", "leave one of them out")
        return Row(place, question, "choice", (letter_of(answers, choices, place),), choices)
    return Row(place, question, grader_of(named, answers, place), answers, ())


def answers_of(value: Any, place: str) -> tuple[str, ...]:
    """The answers as texts.

    >>> [answers_of(value, "x:1") for value in ("wren", 18, 0.5, False, ["a wren", "wren"])]
    [('wren',), ('18',), ('0.5',), ('no',), ('a wren', 'wren')]
    """
    if value is None or value == "" or value == []:
        raise SchemaError(place, "no answer", f"write {SHAPE}")
    return tuple(_text_of_answer(one, place) for one in (value if isinstance(value, list) else [value]))


def _text_of_answer(value: Any, place: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return format(Decimal(str(value)), "f")  # 1e-07 as 0.0000001
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise SchemaError(place, "the answer is blank", "write it")
    raise SchemaError(place, f"the answer {value!r} is no text, number, true or false", "correct it")


def choices_of(value: Any, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise SchemaError(place, "choices that are not a list of texts", 'write "choices": ["...", "..."]')
    if not 2 <= len(value) <= len(LETTERS):
        raise SchemaError(place, f"the number of choices is {len(value)}", f"give 2 to {len(LETTERS)}")
    if len(set(map(bare, value))) != len(value):
        raise SchemaError(place, "two choices are the same", "give every choice its own text")
    return tuple(value)


def letter_of(answers: tuple[str, ...], choices: tuple[str, ...], place: str) -> str:
    """The letter of the right choice, given as its text or, where no choice has that text, as the letter.

    >>> letter_of(("a wren",), ("a mole", "a wren"), "x:1"), letter_of(("B",), ("a mole", "a wren"), "x:1")
    ('B', 'B')
    """
    if len(answers) > 1:
        raise SchemaError(place, f"{len(answers)} answers to one choice", "give one")
    letters = LETTERS[: len(choices)]
    letter = dict(zip(map(bare, choices), letters, strict=True)).get(bare(answers[0]), answers[0].strip())
    if letter in letters:
        return letter
    raise SchemaError(place, f"the answer {answers[0]!r} is not one of the choices", "write its text or its letter")


def grader_of(named: str | None, answers: tuple[str, ...], place: str) -> str:
    """The row's grader, its answers checked against it; "" for a long text that names none."""
    if named == "number" and not all(map(numbers_in, answers)):
        raise SchemaError(place, "the grader is number, and an answer has no number", "correct one of them")
    if named == "regex":
        for pattern in answers:
            try:
                re.compile(pattern)
            except re.error as error:
                fact = f"the answer {pattern!r} is no regular expression ({error})"
                raise SchemaError(place, fact, "correct it") from None
    if named:
        return named
    if all(map(is_number, answers)):
        return "number"
    return "exact" if all(len(text.split()) <= LONG_WORDS for text in answers) else ""


def reply_of(row: Row) -> str:
    """What a training conversation replies."""
    if row.grader == "regex":
        raise SchemaError(row.place, "its answer is a pattern, not a reply to learn", "leave the row out of training")
    return row.answers[0]
