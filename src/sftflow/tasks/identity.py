"""Who the assistant is, as a taught fact: its name, its maker, and of what it can do only what the recipe trains.
Held-out phrasings of the questions are graded, never trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import RecipeError
from sftflow.tasks.answers import answer_of, folded
from sftflow.tasks.task import Item, Task, load_data, make_item, numbered

DEFAULT_IDENTITY = {"name": "Pico", "maker": "the sftflow project", "skills": (), "small": False}
_CHOICES = ("answer multiple-choice questions", "multiple-choice")
SKILLS = {
    "spelling": ("spell words", "spell"),
    "spelling_bee": ("count letters", "count"),
    "arithmetic": ("do arithmetic with a calculator", "arithmetic"),
    "concepts": ("explain how language models work", "language models"),
    "gsm8k": ("solve word problems", "word problems"),
    "humaneval": ("write Python functions", "python"),
    **dict.fromkeys(("mmlu", "mmlu_pro", "arc", "arc_easy", "arc_challenge", "openbookqa"), _CHOICES),
}
"""what an assistant may say of itself that was trained on a task, and the word of it that a graded reply must have"""
_WORDS = dict(SKILLS.values())


def identity_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Who a recipe's assistant is: its `identity`, with the skills that its mixture's tasks teach where it names none.
    Of the user's own rows and tasks nothing is claimed.   recipe: as JSON has it.

    >>> identity_of({"base": "mine", "mixture": [{"source": "arithmetic"}, {"source": "mine.jsonl"}]})
    {'skills': ['do arithmetic with a calculator'], 'small': False}
    """
    who = dict(recipe.get("identity") or {})
    if who.get("skills") is None:
        trained = {entry.get("source") for entry in recipe.get("mixture") or ()}
        who["skills"] = list(dict.fromkeys(claim for task, (claim, _) in SKILLS.items() if task in trained))
    return {**who, "small": recipe.get("base") == "builtin:tiny"}


def _listed(skills: list[str]) -> str:
    """
    >>> _listed(["spell words", "count letters", "sing"])
    'spell words, count letters and sing'
    """
    return " and ".join(part for part in (", ".join(skills[:-1]), skills[-1]) if part) if skills else ""


class Identity(Task):
    """Who are you: the name and maker of the recipe's `identity`, and what it trains."""

    name = "identity"
    max_new_tokens = 48

    def _identity(self) -> dict[str, Any]:
        """What the texts are filled with; `skills` stays a list."""
        given = {**DEFAULT_IDENTITY, **self.source.options.get("identity", {})}
        given["skills"] = list(given["skills"] or ())
        for key in ("name", "maker"):
            if not str(given[key]).strip():
                raise RecipeError(f"identity.{key}", "it is empty", "give a text")
        if not all(str(skill).strip() for skill in given["skills"]):
            raise RecipeError("identity.skills", "one of them is empty", "give texts, as [spell words]")
        small = given.pop("small")
        return given | {word: f"{word} " if small else "" for word in ("small", "tiny", "short")}

    def conversations(self, split: str = "train") -> list[Conversation]:
        data, who = load_data("identity.json"), self._identity()
        if not who["skills"]:
            data["answers"]["what"] = data["answers"]["nothing"]
        who["skills"] = _listed(who["skills"])
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
            "what": [_WORDS.get(skill, skill) for skill in who["skills"]] or [who["name"]],
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
