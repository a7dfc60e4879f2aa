"""Spelling tasks over the shipped word list. A word is either a training word or a test word, by a hash of itself."""

from __future__ import annotations

import random
from functools import cache

from sftflow.chat.schema import Conversation, Part
from sftflow.tasks.task import DATA, Item, Task, ask, is_test_case, last_number, load_data, make_item


@cache
def words(split: str) -> tuple[str, ...]:
    """The word list's train part, or its test part (1 word in 16), told apart by SHA-256."""
    every = (DATA / "words.txt").read_text(encoding="utf-8").split()
    test = {w for w in every if is_test_case(w, 16)}
    return tuple(w for w in every if (w in test) == (split != "train"))


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
        pool = list(words(split))
        out: list[Conversation] = []
        wanted = self.source.limit or len(pool)
        while len(out) < wanted:
            rng.shuffle(pool)
            for word in pool[: wanted - len(out)]:
                text = rng.choice(phrases).format(w=word)
                out.append(ask(text, spelled(word), f"{self.name}:{len(out) + 1}"))
        return out

    def items(self, split: str = "test") -> list[Item]:
        rng, phrases = (
            random.Random(f"{self.name}:items:{split}:{self.source.seed}"),
            load_data("phrases.json")[self.name],
        )
        pool = list(words(split))
        rng.shuffle(pool)
        chosen = pool[: self.source.limit]
        return [make_item(f"{self.name}:{w}", rng.choice(phrases).format(w=w), spelled(w)) for w in chosen]

    def grade(self, item: Item, reply: str) -> float:
        """1 where the reply is the letters, separated by spaces, hyphens or commas, and nothing else."""
        letters = [c for c in reply.strip().rstrip(".").lower() if c not in " -,\n"]
        separated = len(reply.strip()) >= 2 * len(letters) - 1
        return float(separated and letters == item.answer.split())


class SpellingBee(Task):
    """Count a letter in a word: spelled out, then checked with the python tool."""

    name = "spelling_bee"
    max_new_tokens = 96

    def _cases(self, split: str, kind: str) -> list[tuple[str, str, str]]:
        rng = random.Random(f"{self.name}:{kind}:{split}:{self.source.seed}")
        phrases = load_data("phrases.json")[self.name]
        pool = list(words(split))
        out: list[tuple[str, str, str]] = []
        wanted = self.source.limit or len(pool)
        while len(out) < wanted:
            rng.shuffle(pool)
            for word in pool[: wanted - len(out)]:
                # Mostly letters that occur, so that "1" is not the answer to everything.
                letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
                repeated = [c for c in set(word) if word.count(c) > 1]
                if repeated and rng.random() < 0.5:
                    letter = rng.choice(sorted(repeated))
                out.append((rng.choice(phrases).format(w=word, c=letter), word, letter))
            if kind == "items":
                break
        return out

    def conversations(self, split: str = "train") -> list[Conversation]:
        out = []
        for number, (question, word, letter) in enumerate(self._cases(split, "train"), 1):
            count = str(word.count(letter))
            reply = [
                Part("text", f"{spelled(word)}. "),
                Part("python", f"'{word}'.count('{letter}')"),
                Part("python_output", count),
                Part("text", f" The answer is {count}."),
            ]
            out.append(ask(question, reply, f"{self.name}:{number}"))
        return out

    def items(self, split: str = "test") -> list[Item]:
        return [
            make_item(f"{self.name}:{word}:{letter}", question, str(word.count(letter)))
            for question, word, letter in self._cases(split, "items")
        ]

    def grade(self, item: Item, reply: str) -> float:
        return float(last_number(reply) == item.answer)
