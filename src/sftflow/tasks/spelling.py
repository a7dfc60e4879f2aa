"""Spelling tasks over the shipped word list. A word is either a training word or a test word, by a hash of itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice

from sftflow.chat.schema import Conversation, Part
from sftflow.tasks.answers import answer_of, one_writing, same_number
from sftflow.tasks.task import DATA, Item, Task, is_test_case, load_data, make_item, numbered


@cache
def words(split: str) -> tuple[str, ...]:
    """The word list's train part, or its test part (1 word in 16), told apart by SHA-256."""
    every = (DATA / "words.txt").read_text(encoding="utf-8").split()
    test = {w for w in every if is_test_case(w, 16)}
    return tuple(w for w in every if (w in test) == (split != "train"))


def drawn_words(rng: random.Random, split: str, limit: int | None) -> Iterator[str]:
    """`limit` words (None: each once) in random order; in another one each time that all have been drawn."""
    pool = list(words(split))
    left = limit or len(pool)
    while left > 0:
        rng.shuffle(pool)
        yield from pool[:left]
        left -= len(pool)


def spelled(word: str) -> str:
    """
    >>> spelled("cat")
    'c a t'
    """
    return " ".join(word)


class Spelling(Task):
    """Spell a word: `c a t`. Test words are never spelled in training."""

    name = "spelling"
    max_new_tokens = 40

    def conversations(self, split: str = "train") -> list[Conversation]:
        rng, phrases = random.Random(f"{self.name}:{split}:{self.source.seed}"), load_data("phrases.json")[self.name]
        drawn = drawn_words(rng, split, self.source.limit)
        return numbered(self, ((rng.choice(phrases).format(w=word), spelled(word)) for word in drawn))

    def items(self, split: str = "test") -> list[Item]:
        rng = random.Random(f"{self.name}:items:{split}:{self.source.seed}")
        phrases = load_data("phrases.json")[self.name]
        pool = list(words(split))
        rng.shuffle(pool)
        chosen = pool[: self.source.limit]
        return [make_item(f"{self.name}:{w}", rng.choice(phrases).format(w=w), spelled(w)) for w in chosen]

    def grade(self, item: Item, reply: str) -> float:
        """1 where the reply is the letters, separated by spaces, hyphens or commas, and nothing else."""
        said = one_writing(answer_of(reply)).strip()
        letters = [c for c in said.rstrip(".").lower() if c not in " -,\n"]
        separated = len(said) >= 2 * len(letters) - 1
        return float(separated and letters == item.answer.split())


class SpellingBee(Task):
    """Count a letter in a word: spelled out, then checked with the python tool."""

    name = "spelling_bee"
    max_new_tokens = 96

    def _cases(self, split: str, kind: str) -> list[tuple[str, str, str]]:
        rng = random.Random(f"{self.name}:{kind}:{split}:{self.source.seed}")
        phrases = load_data("phrases.json")[self.name]
        out: list[tuple[str, str, str]] = []
        drawn = drawn_words(rng, split, self.source.limit)
        for word in islice(drawn, len(words(split))) if kind == "items" else drawn:
            # Mostly letters that occur, so that "1" is not the answer to everything.
            letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
            repeated = [c for c in set(word) if word.count(c) > 1]
            if repeated and rng.random() < 0.5:
                letter = rng.choice(sorted(repeated))
            out.append((rng.choice(phrases).format(w=word, c=letter), word, letter))
        return out

    def conversations(self, split: str = "train") -> list[Conversation]:
        def reply(word: str, letter: str) -> list[Part]:
            count = str(word.count(letter))
            return [
                Part("text", f"{spelled(word)}. "),
                Part("python", f"'{word}'.count('{letter}')"),
                Part("python_output", count),
                Part("text", f" The answer is {count}."),
            ]

        return numbered(
            self, ((question, reply(word, letter)) for question, word, letter in self._cases(split, "train"))
        )

    def items(self, split: str = "test") -> list[Item]:
        return [
            make_item(f"{self.name}:{word}:{letter}", question, str(word.count(letter)))
            for question, word, letter in self._cases(split, "items")
        ]

    def grade(self, item: Item, reply: str) -> float:
        return float(same_number(reply, item.answer))
