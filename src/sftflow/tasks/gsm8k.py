"""GSM8K: grade-school maths, with its calculator marks as tool calls and its `#### 72` graded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sftflow.chat.schema import Conversation, Part
from sftflow.foundation.errors import SchemaError
from sftflow.tasks.answers import final_number, numbers_in
from sftflow.tasks.task import Item, Task, ask, make_item, rows_of, sample, text_of

SHAPE = '{"question": ..., "answer": "... #### 72"}'
MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
FINAL = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")
ANY = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
GOLD = re.compile(r"####[ \t]*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*\Z")


class Gsm8k(Task):
    """Rows `{"question", "answer"}` of the published files, or of a hub set with the same columns."""

    name = "gsm8k"
    max_new_tokens = 256

    def conversations(self, split: str = "train") -> list[Conversation]:
        return sample(self, (ask(q, split_marks(a, place), place) for place, q, a, _ in self._rows(split)))

    def items(self, split: str = "test") -> list[Item]:
        rows = self._rows(split)
        return sample(self, (make_item(self.id_of(place), q, gold) for place, q, _, gold in rows))

    def grade(self, item: Item, reply: str) -> float:
        """1.0 where the reply's `final_number` is the gold.

        gold 72:  "... 70 ... #### 72" 1.0    "72 clips\\n#### 70" 0.0    "so 72 clips" 1.0    "72, or 70?" 0.0
        """
        return float(final_number(reply) in numbers_in(item.answer))

    def details(self, item: Item, reply: str) -> dict[str, Any]:
        """The two published readings, of the whole reply: strict, the number after the last `####`; flexible, the
        last number. They know no reasoning, no headings, and one way to write a number.

        gold 72:  "#### 72" both 1.0    "so 72" strict 0.0, flexible 1.0    "#### 72 of 80" strict 1.0, flexible 0.0
        """
        readings = {"strict": FINAL.findall(reply), "flexible": ANY.findall(reply)}
        return {name: float(found[-1:] != [] and plain(found[-1]) == item.answer) for name, found in readings.items()}

    def _rows(self, split: str) -> Iterator[tuple[str, str, str, str]]:
        """(place, question, answer, gold) of every row."""
        for place, row in rows_of(self, split):
            question, answer = text_of(row, "question", place, SHAPE), text_of(row, "answer", place, SHAPE)
            yield place, question, answer, gold_of(answer, place)


def plain(number: str) -> str:
    """
    >>> plain("1,080.50")
    '1080.5'
    """
    value = number.replace(",", "")
    return value.rstrip("0").rstrip(".") if "." in value else value


def gold_of(answer: str, place: str) -> str:
    """The final number, without thousands commas and trailing zeros.

    >>> gold_of("He earned $<<540*2=1080>>1,080.\\n#### 1,080", "x:1")
    '1080'
    """
    found = GOLD.search(answer)
    if found is None:
        raise SchemaError(place, "the answer does not end in '#### NUMBER'", "end it with a line such as #### 72")
    return plain(found[1])


def split_marks(answer: str, place: str) -> tuple[Part, ...]:
    """Text, with each calculator mark as a call and its result. The text parts are the answer without its marks.

    "48/2 = <<48/2=24>>24 clips"  ->  text "48/2 = ", python "48/2", python_output "24", text "24 clips"
    """
    parts: list[Part] = []
    # re.split with two groups gives text, call, output, text, call, output, ..., text
    pieces = MARK.split(answer)
    for text, call, output in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        if "<<" in text or ">>" in text:
            raise SchemaError(place, "a calculator mark that is not <<CALL=RESULT>>", "write it like <<48/2=24>>")
        if text:
            parts.append(Part("text", text))
        if call:
            parts += [Part("python", call), Part("python_output", output)]
    return tuple(parts)
