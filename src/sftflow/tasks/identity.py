"""Who the assistant is, as a taught fact. Held-out phrasings of the questions are graded, never trained on."""

from __future__ import annotations

import random

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import RecipeError
from sftflow.tasks.answers import answer_of, folded
from sftflow.tasks.task import Item, Task, load_data, make_item, numbered

DEFAULT_IDENTITY = {"name": "Pico", "maker": "the sftflow project"}


class Identity(Task):
    """Who are you: the name and maker of the recipe's `identity`."""

    name = "identity"
    max_new_tokens = 48

    def _identity(self) -> dict[str, str]:
        given = {**DEFAULT_IDENTITY, **self.source.options.get("identity", {})}
        for key in ("name", "maker"):
            if not str(given[key]).strip():
                raise RecipeError(f"identity.{key}", "it is empty", "give a text")
        return given

    def conversations(self, split: str = "train") -> list[Conversation]:
        data, who = load_data("identity.json"), self._identity()
        rng = random.Random(f"{self.name}:{self.source.seed}")
        rows = [
            (question, rng.choice(data["answers"][kind]).format(**who))
            for kind, questions in data["questions"].items()
            for question in questions["train" if split == "train" else "held_out"]
        ]
        rng.shuffle(rows)
        return numbered(self, rows[: self.source.limit])

    def items(self, split: str = "test") -> list[Item]:
        data, who = load_data("identity.json"), self._identity()
        needs: dict[str, list[str]] = {
            "who": [who["name"], who["maker"]],
            "name": [who["name"]],
            "maker": [who["maker"]],
            "human": ["not a human"],
            "what": ["spell", "count"],
        }
        items = [
            make_item(f"{self.name}:{kind}:{n}", q, needs[kind])
            for kind, questions in data["questions"].items()
            for n, q in enumerate(questions["train" if split == "train" else "held_out"])
        ]
        random.Random(self.source.seed).shuffle(items)
        return items[: self.source.limit]

    def grade(self, item: Item, reply: str) -> float:
        said = folded(answer_of(reply))
        return float(all(folded(need) in said for need in item.answer))
