"""Dialogues of two to four turns, whose last question is about something that the user told before.

    user       My cat is called Pepper.                  a fact: a kind (name), a topic (cat) and a value
    assistant  Okay, I have noted it.
    user       Sorry, her name is Ginger, not Pepper.    perhaps a correction
    assistant  Okay, I have corrected it.
    user       What do birds build?                      perhaps something else in between
    assistant  Birds build nests.
    user       What is my cat called?
    assistant  The name is Ginger.

Topics, wordings, asides and listed names come in two parts, one for training and one that is held out; built names and
numbers are told apart by their hash. So a graded dialogue shares no value, topic or wording with any that was
trained on. Names are many, so that copying is learnt rather than the names.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftflow.chat.schema import Conversation, Message, text_message
from sftflow.foundation.errors import TaskError
from sftflow.tasks.answers import answer_of, bare, holds_text, one_writing
from sftflow.tasks.spelling import words
from sftflow.tasks.task import Item, Task, is_test_case, load_data

ONE_IN = 8  # of the built names and of the numbers are held out
MAX_TURNS = 4  # of the user
MOST_WORDS = 30  # of a right reply: a base goes on and on, and may come by the answer
NOT_SAID = re.compile(r"\?|\b(?:not|never|cannot|my|our)\b|n't\b", re.I)
"""in a sentence that asks for the answer, denies it, or is what the user would say"""


@dataclass(frozen=True)
class Fact:
    """Something that the user told.   old: what was said first and then taken back."""

    kind: str
    topic: str
    pronoun: str
    value: str
    old: str = ""


class _Writer:
    """Writes dialogues of one split, one after the other, from one stream of chance."""

    def __init__(self, split: str, seed: str) -> None:
        self.rng, self.data = random.Random(seed), load_data("dialogue.json")
        self.part = "train" if split == "train" else "held_out"
        self.kinds: dict[str, Any] = self.data["kinds"]
        # No value by chance is a word that stands in the lists: a name of the other part in small letters, say.
        lists: dict[str, list[str]] = load_data("topics.json")["lists"]
        self.ours = {*re.findall(r"\w+", json.dumps([self.data, lists]).casefold())}
        self.lists = {**lists, "word": [w for w in words(split) if w not in self.ours]}

    def pick(self, texts: Mapping[str, Sequence[Any]]) -> Any:
        """One of the split's part."""
        return self.rng.choice(texts[self.part])

    def maybe(self, share: float) -> bool:
        return self.rng.random() < share

    # ---- facts

    def value(self, kind: str, topic: str, taken: set[str]) -> str:
        """A value for such a fact that has not been said in this dialogue."""
        pool = self.kinds[kind]["values"]
        pool = self.data["values"].get(topic, "name") if pool == "by topic" else pool
        while True:
            if pool in ("number", "place") or (pool == "name" and self.maybe(0.7)):
                built = [] if pool == "number" else [self.data["built"][k] for k in ("start", "middle", f"{pool} end")]
                value = "".join(map(self.rng.choice, built)) or str(self.rng.randint(2, 99))
                if value.casefold() in self.ours or is_test_case(value, ONE_IN) == (self.part == "train"):
                    continue
            else:
                listed = self.data["names"][self.part] if pool == "name" else self.lists.get(str(pool), pool)
                value = self.rng.choice(listed)
            if value.casefold() not in taken:
                taken.add(value.casefold())
                return value

    def fact(self, told: Sequence[Fact], taken: set[str]) -> Fact:
        """A new one: often of a kind or about a topic that was told of, so that the question must be read."""
        while True:
            kind = told[0].kind if told and self.maybe(0.4) else self.rng.choice(self.data["shares"])
            topics = self.kinds[kind]["topics"][self.part]
            same = [t for t in topics if told and t.startswith(f"{told[0].topic}/")]
            topic, _, pronoun = (same[0] if same and self.maybe(0.5) else self.rng.choice(topics)).partition("/")
            if (kind, topic) not in [(f.kind, f.topic) for f in told]:
                return Fact(kind, topic, pronoun, self.value(kind, topic, taken))

    # ---- turns

    def say(self, wording: str, fact: Fact) -> str:
        said = wording.format(t=fact.topic, p=fact.pronoun, v=fact.value, o=fact.old)
        return re.sub(r"\ba (?=[aeiou])", "an ", said[0].upper() + said[1:])

    def dialogue(self) -> tuple[tuple[Message, ...], Fact, list[str]]:
        """All messages with the last reply, the fact that is asked for last, and all other values."""
        taken: set[str] = set()
        told: list[Fact] = []
        for _ in range(self.rng.choice((1, 1, 2))):
            told.append(self.fact(told, taken))
        together = self.maybe(0.3)
        turns: list[tuple[str, str]] = []
        for facts in [told] if together else [[fact] for fact in told]:
            said = " ".join(self.say(self.pick(self.kinds[f.kind]["tell"]), f) for f in facts)
            turns.append((said, self.pick(self.data["ack"])))
        if len(turns) < MAX_TURNS - 1 and self.maybe(0.35):
            n = self.rng.randrange(len(told))
            was = told[n]
            told[n] = now = replace(was, value=self.value(was.kind, was.topic, taken), old=was.value)
            texts = self.kinds[now.kind]["correct"] if self.maybe(0.5) else self.data["correct"]
            turns.append((self.say(self.pick(texts), now), self.pick(self.data["corrected"])))
        if len(turns) < MAX_TURNS - 1 and self.maybe(0.35):
            turns.insert(self.rng.randint(1, len(turns)), tuple(self.pick(self.data["aside"])))
        asked = self.rng.sample(told, min(len(told), MAX_TURNS - len(turns), self.rng.choice((1, 2, 2))))
        for n, fact in enumerate(asked):
            short = n > 0 and fact.kind == asked[0].kind and fact.kind not in ("me", "favorite") and self.maybe(0.5)
            question = self.pick(self.data["again"] if short else self.kinds[fact.kind]["ask"])
            turns.append((self.say(question, fact), self.say(self.kinds[fact.kind]["reply"], fact)))
        messages = [m for u, a in turns for m in (text_message("user", u), text_message("assistant", a))]
        others = [v for f in told for v in (f.value, f.old) if v and v != asked[-1].value]
        return tuple(messages), asked[-1], others


class Dialogue(Task):
    """Names and facts that the user told, and perhaps corrected, asked for up to three turns later."""

    name = "dialogue"

    def _dialogues(self, split: str, count: int) -> list[tuple[tuple[Message, ...], Fact, list[str]]]:
        writer = _Writer(split, f"{self.name}:{split}:{self.source.seed}")
        return [writer.dialogue() for _ in range(count)]

    def conversations(self, split: str = "train") -> list[Conversation]:
        rows = self._dialogues(split, self.source.limit or 2000)
        return [Conversation(messages, (), {}, f"{self.name}:{n}") for n, (messages, _, _) in enumerate(rows, 1)]

    def items(self, split: str = "test") -> list[Item]:
        rows = self._dialogues(split, self.source.limit or 200)
        return [
            Item(
                id=f"{self.name}:{n}:{fact.kind}",
                messages=messages[:-1],
                answer={"says": fact.value, "not": others},
            )
            for n, (messages, fact, others) in enumerate(rows)
        ]

    def examples(self, n: int) -> list[tuple[str, Conversation]]:
        raise TaskError(self.name, "a dialogue in front of it would tell other facts of the same user")

    def grade(self, item: Item, reply: str) -> float:
        """1 where the reply says what was asked for, in few words, without anything else that was told, and repeats no
        turn of the user's."""
        said = one_writing(answer_of(reply))
        sentences = re.split(r"(?<=[.!?])\s+|\n", said)
        right = holds_text(" ".join(s for s in sentences if not NOT_SAID.search(s)), item.answer["says"])
        wrong = any(holds_text(said, other) for other in item.answer["not"])
        repeats = any(bare(m.text) in bare(said) for m in item.messages if m.role == "user")
        return float(right and not wrong and not repeats and len(said.split()) <= MOST_WORDS)
