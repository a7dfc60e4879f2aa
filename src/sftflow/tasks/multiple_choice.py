"""Multiple choice as a letter: ARC, OpenBookQA, and any set in their layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import SchemaError
from sftflow.tasks.answers import WORD, answer_of, marked_text, one_writing
from sftflow.tasks.task import Item, Task, ask, line_of, make_item, rows_of, sample, text_of

LETTERS = ("A", "B", "C", "D", "E")
SHAPE = '{"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}'


@dataclass(frozen=True, slots=True)
class Question:
    """place: FILE:LINE.   id: the Item's.   text: the question.   choices: their texts, A first.   answer: a letter."""

    place: str
    id: str
    text: str
    choices: tuple[str, ...]
    answer: str


class MultipleChoice(Task):
    """Rows `{"question", "choices": {"text", "label"}, "answerKey"}`, whatever the labels (A B C D, 1 2 3 4)."""

    name = "arc"
    max_new_tokens = 16  # the letter, or a short sentence around it

    def questions(self, split: str) -> Iterator[Question]:
        """Every row of the set; a subclass with another layout overrides only this."""
        for place, row in rows_of(self, split):
            yield parse_choices(row, place, f"{self.name}:{line_of(place)}")

    def conversations(self, split: str = "train") -> list[Conversation]:
        return [ask(prompt(q.text, q.choices), q.answer, q.place) for q in sample(self, self.questions(split))]

    def items(self, split: str = "test") -> list[Item]:
        return [
            make_item(q.id, prompt(q.text, q.choices), q.answer, choices=LETTERS[: len(q.choices)])
            for q in sample(self, self.questions(split))
        ]

    def grade(self, item: Item, reply: str) -> float:
        return float(first_letter(reply, item.choices) == item.answer)


def prompt(question: str, choices: Sequence[str]) -> str:
    """The question as the user asks it.

    >>> print(prompt("Which one flies?", ["a wren", "a mole", "a pike"]))
    Which one flies?
    A. a wren
    B. a mole
    C. a pike
    Answer with the letter only.
    """
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter only."])


def first_letter(reply: str, letters: Sequence[str]) -> str | None:
    r"""The letter in the reply's last \boxed{...}, else the first choice letter that stands alone, in capitals. The
    article of "A mole" counts as one.

    >>> [first_letter(r, "ABCD") for r in ("B", "B.", "(B) a mole", "Answer: B", "b", "Bees, so E")]
    ['B', 'B', 'B', 'B', None, None]
    """
    said = one_writing(answer_of(reply))
    alone = re.compile(rf"(?<!{WORD})(?<!{WORD}')[{''.join(letters)}](?!'?{WORD})")
    found = (alone.search(marked_text(said) or "") or alone.search(said)) if letters else None
    return found[0] if found else None


def parse_choices(row: Any, place: str, name: str) -> Question:
    """One row of the layout, its own labels mapped to letters in order: labels 1 2 3 4, answerKey 2 -> answer B."""
    question = text_of(row, "question", place, SHAPE)
    choices = row.get("choices")
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise SchemaError(place, "no lists under choices.text and choices.label", f"write {SHAPE}")
    if not all(isinstance(text, str) for text in texts):
        raise SchemaError(place, "a choice that is not a text", "make every choice a string")
    if len(texts) != len(labels):
        raise SchemaError(place, f"{len(texts)} choices but {len(labels)} labels", "give every choice one label")
    if not 2 <= len(texts) <= len(LETTERS):
        raise SchemaError(place, f"the number of choices is {len(texts)}", f"give 2 to {len(LETTERS)}")
    names, key = [str(label).strip() for label in labels], str(row.get("answerKey", "")).strip()
    if len(set(names)) != len(names):
        raise SchemaError(place, f"labels repeat ({', '.join(names)})", "give every choice its own label")
    if key not in names:
        raise SchemaError(place, f"answerKey {key!r} is not one of {', '.join(names)}", "correct it")
    return Question(place, name, question, tuple(texts), LETTERS[names.index(key)])
