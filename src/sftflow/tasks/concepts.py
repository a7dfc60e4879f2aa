"""Short answers about how language models work. Held-out phrasings are graded, never trained on."""

from __future__ import annotations

import random

from sftflow.chat.schema import Conversation
from sftflow.tasks.answers import answer_of, folded
from sftflow.tasks.task import Item, Task, load_data, make_item, numbered


class Concepts(Task):
    """Short answers about how language models work; graded by the key facts each answer must contain."""

    name = "concepts"
    max_new_tokens = 80

    def conversations(self, split: str = "train") -> list[Conversation]:
        rows = [
            (question, entry["answer"])
            for entry in load_data("concepts.jsonl")
            for question in entry["train" if split == "train" else "held_out"]
        ]
        random.Random(f"{self.name}:{self.source.seed}").shuffle(rows)
        return numbered(self, rows[: self.source.limit])

    def items(self, split: str = "test") -> list[Item]:
        items = [
            make_item(f"{self.name}:{entry['id']}:{n}", q, entry["keys"])
            for entry in load_data("concepts.jsonl")
            for n, q in enumerate(entry["train" if split == "train" else "held_out"])
        ]
        random.Random(self.source.seed).shuffle(items)
        return items[: self.source.limit]

    def grade(self, item: Item, reply: str) -> float:
        """1 where every group of key facts is met by one of its wordings."""
        text = folded(answer_of(reply))
        return float(all(any(folded(key) in text for key in group) for group in item.answer))
