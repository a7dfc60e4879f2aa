"""Arithmetic with the calculator tool. A pair of operands is either a training or a test pair, by its hash."""

from __future__ import annotations

import random

from sftflow.chat.schema import Conversation, Part
from sftflow.foundation.calculator import calculate
from sftflow.tasks.answers import same_number
from sftflow.tasks.task import Item, Task, is_test_case, load_data, make_item, numbered


class Arithmetic(Task):
    """One operation on numbers of up to three digits."""

    name = "arithmetic"
    max_new_tokens = 64

    def _cases(self, split: str, count: int) -> list[tuple[str, str, str]]:
        """(question, expression, result)"""
        rng, phrases = random.Random(f"{self.name}:{split}:{self.source.seed}"), load_data("phrases.json")[self.name]
        out: list[tuple[str, str, str]] = []
        while len(out) < count:
            op = rng.choice("++--**/")
            a, b = rng.randint(1, 999), rng.randint(1, 999)
            if op == "*":
                a, b = rng.randint(2, 99), rng.randint(2, 99)
            if op == "/":
                b = rng.randint(2, 25)
                a = b * rng.randint(2, 40)
            if op == "-" and b > a:
                a, b = b, a
            expression = f"{a}{op}{b}"
            if is_test_case(expression, 8) != (split != "train"):
                continue
            result = calculate(expression)
            assert result is not None, expression
            template = rng.choice(phrases["signs"] if rng.random() < 0.6 else phrases["words"][op])
            out.append((template.format(a=a, b=b, op=op), expression, result))
        return out

    def conversations(self, split: str = "train") -> list[Conversation]:
        rows = [
            (asked, [Part("python", call), Part("python_output", result), Part("text", f"The answer is {result}.")])
            for asked, call, result in self._cases(split, self.source.limit or 3000)
        ]
        return numbered(self, rows)

    def items(self, split: str = "test") -> list[Item]:
        return [
            make_item(f"{self.name}:{expression}:{n}", asked, result)
            for n, (asked, expression, result) in enumerate(self._cases(split, self.source.limit or 200))
        ]

    def grade(self, item: Item, reply: str) -> float:
        return float(same_number(reply, item.answer))
