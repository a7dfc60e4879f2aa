"""Multiple choice as a letter: ARC, OpenBookQA, and any set in their layout."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import SchemaError
from sftflow.tasks.answers import WORD, answer_of, marked_text, one_writing
from sftflow.tasks.task import Item, Task, ask, make_item, rows_of, sample, text_of

LETTERS = tuple(string.ascii_uppercase)
# What tells the letter from the article at a sentence's beginning ("A mole is blind") and from the pronoun ("I think").
_ARTICLE = re.compile(
    r"(?:^|[.!?:;\n(\"'*]\s*)A "
    r"(?!(?:is|was|and|or|because|since|as|would|will|should|must|can|cannot|has|seems|fits|best)\b)(?=[a-z])"
)
_PRONOUN = re.compile(r"\bI (?!(?:is|and|or|because|since)\b)(?=[a-z])")
SHAPE = '{"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}'


@dataclass(frozen=True, slots=True)
class Question:
    """place: FILE:LINE.   id: the Item's.   text: the question.   choices: their texts, A first.   answer: a letter.
    group: its subject; examples for `--shots` are of the same."""

    place: str
    id: str
    text: str
    choices: tuple[str, ...]
    answer: str
    group: str = ""


class MultipleChoice(Task):
    """Rows `{"question", "choices": {"text", "label"}, "answerKey"}`, whatever the labels (A B C D, 1 2 3 4)."""

    name = "arc"
    max_new_tokens = 16  # the letter, or a short sentence around it
    _groups: Mapping[str, str] = MappingProxyType({})

    def questions(self, split: str) -> Iterator[Question]:
        """Every row of the set; a subclass with another layout overrides only this."""
        for place, row in rows_of(self, split):
            yield parse_choices(row, place, self.id_of(place))

    def conversations(self, split: str = "train") -> list[Conversation]:
        return [ask(prompt(q.text, q.choices), q.answer, q.place) for q in sample(self, self.questions(split))]

    def items(self, split: str = "test") -> list[Item]:
        questions = sample(self, self.questions(split))
        self._groups = {q.id: q.group for q in questions}
        return [
            make_item(q.id, prompt(q.text, q.choices), q.answer, choices=LETTERS[: len(q.choices)]) for q in questions
        ]

    def grade(self, item: Item, reply: str) -> float:
        return float(first_letter(reply, item.choices) == item.answer)

    def examples(self, n: int) -> list[tuple[str, Conversation]]:
        questions = self.of_examples(None).questions("train")
        return [(q.group, ask(prompt(q.text, q.choices), q.answer, q.place)) for q in questions]

    def group_of(self, item: Item) -> str:
        return self._groups.get(item.id, "")


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
    pronoun of "I think" is none, and the article of "A mole" is one only where there is no other.

    >>> [first_letter(r, "ABCD") for r in ("B", "B.", "(B) a mole", "Answer: B", "b", "Bees, so E")]
    ['B', 'B', 'B', 'B', None, None]
    >>> [first_letter(r, LETTERS[:10]) for r in ("I think it is B.", "I", "A mole digs: J", "A mole", "A is it, not B")]
    ['B', 'I', 'J', 'A', 'A']
    """
    said = _PRONOUN.sub("", one_writing(answer_of(reply)))
    alone = re.compile(rf"(?<!{WORD})(?<!{WORD}')[{''.join(letters)}](?!'?{WORD})")
    places = (marked_text(said) or "", _ARTICLE.sub(" ", said), said) if letters else ()
    found = next((letter for place in places if (letter := alone.search(place))), None)
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
