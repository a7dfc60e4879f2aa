"""Verifiable instructions: code checks the form of the reply, whatever it says (after IFEval, Zhou et al. 2023).

A (kind, subject, phrasing) is either a training or a test case, by its hash; a test case that stands inside a
training question, or around one, is left out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import cycle
from typing import Any

from sftflow.chat.schema import Conversation
from sftflow.tasks.answers import answer_of
from sftflow.tasks.task import Item, Task, is_test_case, load_data, make_item, numbered

NUMBERS = {2: "two", 3: "three", 4: "four"}

ONE_IN = 8  # of the cases are test cases
MAX_ITEMS = 120  # two kinds have not many more held-out cases than a sixth of this, and one_word has fewer
TRIES = 1000  # after which a kind has run out of cases, and the next one has its turn

Case = tuple[str, str, dict[str, Any]]  # question, reply, what the checker needs (with its "kind")


def _bullets(rng: random.Random, data: Any) -> Case:
    topic, n = rng.choice(sorted(data["sentences"])), rng.choice((2, 3, 4))
    ask_for = rng.choice(data["bullets"])
    lines = rng.sample(data["sentences"][topic], n)
    return ask_for.format(n=NUMBERS[n], t=topic), "\n".join(f"- {x}" for x in lines), {"kind": "bullets", "n": n}


def _commas(rng: random.Random, data: Any) -> Case:
    what, n = rng.choice(sorted(data["lists"])), rng.choice((2, 3, 4))
    ask_for = rng.choice(data["commas"])
    picked = rng.sample(data["lists"][what], n)
    return ask_for.format(n=NUMBERS[n], t=what), ", ".join(picked), {"kind": "commas", "n": n}


def _json(rng: random.Random, data: Any) -> Case:
    pools = {k: data["lists"][v] if isinstance(v, str) else v for k, v in data["json_values"].items()}
    keys = rng.sample(list(pools), rng.choice((2, 2, 3)))
    value = {k: rng.choice(pools[k]) for k in keys}
    named = " and ".join([", ".join(keys[:-1]), keys[-1]])
    return rng.choice(data["json"]).format(k=named), json.dumps(value), {"kind": "json", "keys": keys}


def _one_word(rng: random.Random, data: Any) -> Case:
    question, answer = rng.choice(data["one_word_answers"])
    return rng.choice(data["one_word"]).format(q=question), answer, {"kind": "one_word", "answer": answer}


def _capitals(rng: random.Random, data: Any) -> Case:
    question, answer = rng.choice(data["one_word_answers"])
    return rng.choice(data["capitals"]).format(q=question), answer.upper(), {"kind": "capitals"}


def _ends_with(rng: random.Random, data: Any) -> Case:
    topic, word = rng.choice(sorted(data["sentences"])), rng.choice(data["end_words"])
    ask_for = rng.choice(data["ends_with"])
    lines = " ".join(rng.sample(data["sentences"][topic], 2))
    return ask_for.format(t=topic, w=word), f"{lines} {word}", {"kind": "ends_with", "word": word}


def is_held_out(question: str) -> bool:
    """Whether it is a test question, and so is every phrasing inside it or around it ("Answer in one word: X")."""
    asked = question.removeprefix("Answer in one word: ").removeprefix("In one word: ")
    nested = () if asked == question else (f"Answer in one word: {asked}", f"In one word: {asked}")
    return all(is_test_case(case, ONE_IN) for case in (question, *nested))


MAKERS: tuple[Callable[[random.Random, Any], Case], ...] = (_bullets, _commas, _json, _one_word, _capitals, _ends_with)


def check_bullets(need: dict[str, Any], reply: str) -> bool:
    lines = [x for x in reply.strip().split("\n") if x.strip()]
    return len(lines) == need["n"] and all(re.match(r"[-*•] \S", x.strip()) for x in lines)


def check_commas(need: dict[str, Any], reply: str) -> bool:
    items = [x.strip(" .") for x in reply.strip().split(",")]
    return "\n" not in reply.strip() and len(items) == need["n"] == len({x for x in items if x})


def check_json(need: dict[str, Any], reply: str) -> bool:
    try:
        value = json.loads(reply.strip())
    except ValueError:
        return False
    return isinstance(value, dict) and sorted(value) == sorted(need["keys"])


def check_one_word(need: dict[str, Any], reply: str) -> bool:
    """One word, and the right one: the questions have one-word answers that everybody knows."""
    return reply.strip().rstrip(".!").lower() == need["answer"]


def check_capitals(need: dict[str, Any], reply: str) -> bool:
    return any(c.isalpha() for c in reply) and reply == reply.upper()


def check_ends_with(need: dict[str, Any], reply: str) -> bool:
    words = reply.strip().split()
    return len(words) > 1 and words[-1].strip(".!").lower() == need["word"]


CHECKS: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "bullets": check_bullets,
    "commas": check_commas,
    "json": check_json,
    "one_word": check_one_word,
    "capitals": check_capitals,
    "ends_with": check_ends_with,
}


class Formatting(Task):
    """Exactly two bullets, JSON with these keys, one word, capitals, a given last word."""

    name = "formatting"
    max_new_tokens = 96

    def _cases(self, split: str, count: int) -> list[Case]:
        data = load_data("topics.json") | load_data("phrases.json")[self.name]
        rng = random.Random(f"{self.name}:{split}:{self.source.seed}")
        out: list[Case] = []
        seen: set[str] = set()
        count = count if split == "train" else min(count, MAX_ITEMS)
        turns = cycle(MAKERS)
        while len(out) < count:
            maker = next(turns)
            for _ in range(TRIES):
                case = maker(rng, data)
                fits = (
                    not is_test_case(case[0], ONE_IN)
                    if split == "train"
                    else is_held_out(case[0]) and case[0] not in seen
                )
                if fits:
                    seen.add(case[0])
                    out.append(case)
                    break
        return out

    def conversations(self, split: str = "train") -> list[Conversation]:
        cases = self._cases(split, self.source.limit or 2400)
        return numbered(self, ((question, reply) for question, reply, _ in cases))

    def items(self, split: str = "test") -> list[Item]:
        cases = self._cases(split, self.source.limit or MAX_ITEMS)
        return [make_item(f"{self.name}:{n}:{need['kind']}", q, need) for n, (q, _, need) in enumerate(cases)]

    def grade(self, item: Item, reply: str) -> float:
        return float(CHECKS[item.answer["kind"]](item.answer, answer_of(reply)))
